"""Attention, one program per query tile and KV head, over all keys that the tile sees.

Serves prefill, and decoding wherever that gives programs enough to fill the GPU.

Shapes: T query tokens of B requests, Hkv KV heads of GROUP query heads, D and DV head dims, pages
of S slots. q [T, Hq, D], k_pages [P, S, Hkv, D], v_pages [P, S, Hkv, DV] (packed ones as
``kv_formats`` says), page_table [B, L], out [T, Hq, DV].
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.attention.triton_tile import (
    FLOOR,
    attend,
    load_queries,
    load_tilt,
    merge,
    place,
    visible,
)
from oxillama_torch.kernels.triton_support import pdl_begin

__all__ = ["prefill_kernel"]


# Not compiled anew for each size of a batch.
@triton.jit(do_not_specialize=["width", "tiles", "window"])
def prefill_kernel(
    q, k_pages, v_pages, page_table, query_start, seq_lens, sinks, slopes, out,
    width, tiles, segment, factor, inner, cap, window,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr, SEGMENTED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DOT_DTYPE: tl.constexpr, KV: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (request * tiles + tile, KV head); the last tiles, which see most, come first."""
    pdl_begin(USE_PDL)
    request = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    kv_head = tl.program_id(1)
    start, begin, length, origin = place(query_start, seq_lens, request, tile, TOKENS)
    if origin >= length:
        return
    x, position, row, valid = load_queries(
        q, start, begin, length, origin, kv_head,
        HKV, GROUP, D, TOKENS, BLOCK_M, BLOCK_D, DOT_DTYPE,
    )  # fmt: skip
    low, left, right, high = visible(begin, length, origin, window, TOKENS, HAS_WINDOW, BLOCK_N)
    table = page_table + request.to(tl.int64) * width

    top = tl.full((BLOCK_M,), FLOOR, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    if HAS_SINKS:
        head = kv_head * GROUP + tl.arange(0, BLOCK_M) % GROUP
        top = tl.load(sinks + head) * 1.4426950408889634 / factor
        total += 1.0
    tilt = 0.0
    if HAS_SLOPES:
        tilt = load_tilt(slopes, kv_head, factor, GROUP, BLOCK_M)
    if SEGMENTED:
        for first in range(low // segment * segment, high, segment):
            part_top, part_total, part_acc = attend(
                x, position, tl.full((BLOCK_M,), FLOOR, tl.float32),
                tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M, BLOCK_DV), tl.float32),
                k_pages, v_pages, table, kv_head,
                tl.maximum(first, low), tl.minimum(first + segment, high), left, right, length,
                factor, inner, cap, window, tilt, HKV, D, DV, S, HAS_WINDOW, HAS_CAP, HAS_SLOPES,
                BLOCK_N, BLOCK_D, BLOCK_DV, DOT_DTYPE, KV,
            )  # fmt: skip
            top, total, acc = merge(top, total, acc, part_top, part_total, part_acc, factor)
    else:
        top, total, acc = attend(
            x, position, top, total, acc, k_pages, v_pages, table, kv_head, low, high, left, right,
            length, factor, inner, cap, window, tilt, HKV, D, DV, S, HAS_WINDOW, HAS_CAP,
            HAS_SLOPES, BLOCK_N, BLOCK_D, BLOCK_DV, DOT_DTYPE, KV,
        )  # fmt: skip
    d = tl.arange(0, BLOCK_DV)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * DV + d[None, :], result, mask=valid[:, None] & (d < DV)[None, :])
