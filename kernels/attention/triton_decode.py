"""Attention, one program per query tile, KV head and segment of keys (split-KV, "flash decoding").

Decoding has too few query tiles to fill a GPU, so the keys are divided among programs as well. Each
leaves what it found in its segment; ``triton_reduce`` merges the segments.

Shapes: as in ``triton_prefill``; N segments. part_acc [T, Hq, N, DV], part_top and
part_total [T, Hq, N], all float32.

Source: Dao et al., Flash-Decoding for long-context inference, 2023.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.attention.triton_tile import (
    FLOOR,
    attend,
    load_queries,
    load_tilt,
    place,
    visible,
)
from oxillama_torch.kernels.triton_support import pdl_begin

__all__ = ["decode_kernel"]


# Not compiled anew for each size of a batch.
@triton.jit(do_not_specialize=["width", "tiles", "window"])
def decode_kernel(
    q, k_pages, v_pages, page_table, query_start, seq_lens, slopes, part_top, part_total,
    part_acc, width, tiles, segment, factor, inner, cap, window,
    HKV: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DOT_DTYPE: tl.constexpr, KV: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (request * tiles + tile, KV head, segment)."""
    pdl_begin(USE_PDL)
    request = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(1)
    first = tl.program_id(2) * segment
    start, begin, length, origin = place(query_start, seq_lens, request, tile, TOKENS)
    if origin >= length:
        return
    low, left, right, high = visible(begin, length, origin, window, TOKENS, HAS_WINDOW, BLOCK_N)
    if (first >= high) | (first + segment <= low):
        return
    x, position, row, valid = load_queries(
        q, start, begin, length, origin, kv_head,
        HKV, GROUP, D, TOKENS, BLOCK_M, BLOCK_D, DOT_DTYPE,
    )  # fmt: skip
    tilt = 0.0
    if HAS_SLOPES:
        tilt = load_tilt(slopes, kv_head, factor, GROUP, BLOCK_M)
    top, total, acc = attend(
        x, position, tl.full((BLOCK_M,), FLOOR, tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), k_pages, v_pages,
        page_table + request.to(tl.int64) * width, kv_head,
        tl.maximum(first, low), tl.minimum(first + segment, high), left, right, length,
        factor, inner, cap, window, tilt, HKV, D, DV, S, HAS_WINDOW, HAS_CAP, HAS_SLOPES,
        BLOCK_N, BLOCK_D, BLOCK_DV, DOT_DTYPE, KV,
    )  # fmt: skip
    part = row * tl.num_programs(2) + tl.program_id(2)
    tl.store(part_top + part, top, mask=valid)
    tl.store(part_total + part, total, mask=valid)
    d = tl.arange(0, BLOCK_DV)
    tl.store(
        part_acc + part[:, None] * DV + d[None, :], acc, mask=valid[:, None] & (d < DV)[None, :]
    )
