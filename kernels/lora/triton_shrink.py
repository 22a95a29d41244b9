"""First half of a low-rank term: ``h = A x`` for tiles of rows that share an adapter.

The inputs are cut into splits of a fixed length that are summed one by one in the second half: few
rows occupy the whole GPU, and the order of additions depends on K alone.

Shapes: P rows with an adapter, K inputs, R most ranks of a term, T tiles, S splits.
x [M, K], h float32 [S, parts, P, R].
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.triton_support import pdl_begin

__all__ = ["shrink_kernel"]


@triton.jit
def shrink_kernel(
    x, x_stride, rows, tiles, first, h, P, K, R, a_stride,
    PARTS: tl.constexpr, FACTOR_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tile i of the rows; part and split of the inputs j."""
    part = tl.program_id(1) % PARTS
    split = tl.program_id(1) // PARTS
    tile = tiles + tl.program_id(0) * 3
    pdl_begin(USE_PDL)
    entry = tl.load(tile).to(tl.pointer_type(tl.int64)) + (first + part) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    if rank == 0:
        return
    a = tl.multiple_of(tl.load(entry).to(tl.pointer_type(FACTOR_DTYPE)), 16)
    place = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    inside = place < tl.load(tile + 2)
    row = tl.load(rows + place, mask=inside, other=0)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R).to(tl.int64)
        acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for k0 in range(split * SPLIT, min(split * SPLIT + SPLIT, K), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            w = tl.load(a + r[:, None] * a_stride + k[None, :], mask=(k < K)[None, :], other=0.0)
            mask = inside[None, :] & (k < K)[:, None]
            xt = tl.load(x + row[None, :] * x_stride + k[:, None], mask=mask, other=0.0)
            acc = tl.dot(w.to(DOT_DTYPE), xt.to(DOT_DTYPE), acc, input_precision="ieee")
        line = (split * PARTS + part).to(tl.int64) * P + place
        tl.store(h + line[None, :] * R + r[:, None], acc, mask=inside[None, :])
