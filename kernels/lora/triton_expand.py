"""Second half of a low-rank term: ``y += scale * B h`` for tiles of rows that share an adapter.

Shapes: P rows with an adapter, R most ranks of a term, T tiles, S splits of the inputs.
h float32 [S, parts, P, R], y [M, N0 + N1 + N2].
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.triton_support import pdl_begin

__all__ = ["expand_kernel"]


@triton.jit
def expand_kernel(
    h, rows, scales, tiles, first, y, y_stride, P, R, splits, N0, N1, N2,
    PARTS: tl.constexpr, FACTOR_DTYPE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j, p): outputs of tile i of part p, for the rows of tile j."""
    part = tl.program_id(2)
    size = tl.where(part == 0, N0, tl.where(part == 1, N1, N2))
    begin = tl.where(part == 0, 0, tl.where(part == 1, N0, N0 + N1))
    tile = tiles + tl.program_id(1) * 3
    pdl_begin(USE_PDL)
    entry = tl.load(tile).to(tl.pointer_type(tl.int64)) + (first + part) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if (rank == 0) | (tl.program_id(0) * BLOCK_N >= size):
        return
    b = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(FACTOR_DTYPE)), 16)
    place = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    inside = place < tl.load(tile + 2)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        ht = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        for split in range(0, splits):
            line = (split * PARTS + part).to(tl.int64) * P + place
            ht += tl.load(h + line[None, :] * R + r[:, None], mask=inside[None, :], other=0.0)
        w = tl.load(b + n[:, None] * rank + r[None, :], mask=(n < size)[:, None], other=0.0)
        acc = tl.dot(w.to(DOT_DTYPE), ht.to(DOT_DTYPE), acc, input_precision="ieee")
    row = tl.load(rows + place, mask=inside, other=0)
    scale = tl.load(scales + place, mask=inside, other=0.0)
    mask = (n < size)[:, None] & inside[None, :]
    out = y + row[None, :] * y_stride + (begin + n)[:, None]
    total = tl.load(out, mask=mask, other=0.0).to(tl.float32) + acc * scale[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=mask)
