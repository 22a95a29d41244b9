"""Merge the segments that ``triton_decode`` left, in order of position.

Shapes: as in ``triton_decode``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.attention.triton_tile import FLOOR, merge
from oxillama_torch.kernels.triton_support import pdl_begin

__all__ = ["reduce_kernel"]


# Not compiled anew for each size of a batch.
@triton.jit(do_not_specialize=["max_query_len", "segments", "window"])
def reduce_kernel(
    part_top, part_total, part_acc, query_start, seq_lens, sinks, out,
    max_query_len, segments, segment, factor, window,
    HQ: tl.constexpr, DV: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCK_DV: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (request * max_query_len + query token, query head)."""
    pdl_begin(USE_PDL)
    request = tl.program_id(0) // max_query_len
    index = tl.program_id(0) % max_query_len
    head = tl.program_id(1)
    start = tl.load(query_start + request)
    new = tl.load(query_start + request + 1) - start
    if index >= new:
        return
    position = tl.load(seq_lens + request) - new + index
    low = position * 0
    if HAS_WINDOW:
        low = tl.maximum(position + 1 - window, 0)
    row = (start + index).to(tl.int64) * HQ + head

    d = tl.arange(0, BLOCK_DV)
    top = tl.full((1,), FLOOR, tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((1, BLOCK_DV), tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks + head + tl.arange(0, 1)) * 1.4426950408889634 / factor
        total += 1.0
    for part in range(low // segment, position // segment + 1):
        at = row * segments + part + tl.arange(0, 1)
        part_values = tl.load(part_acc + at[:, None] * DV + d[None, :], mask=(d < DV)[None, :])
        top, total, acc = merge(
            top, total, acc, tl.load(part_top + at), tl.load(part_total + at), part_values, factor
        )
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + row * DV + d[None, :], result, mask=(d < DV)[None, :])
