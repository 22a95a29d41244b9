"""A kernel that does nothing but decode tiles, for testing tile decoders."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    out, p0, p1, p2, p3, s0, s1, s2, s3, N, K,
    DECODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FAR: tl.constexpr = False,
):  # fmt: skip
    """out [programs * BLOCK_N, K] = weights of rows below N; FAR moves the others far away."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask = rows < N
    source = tl.where(row_mask, rows, rows + (1 << 40)) if FAR else rows
    w = DECODE(
        p0, p1, p2, p3, s0, s1, s2, s3, source, row_mask, tl.program_id(1) * BLOCK_K, K,
        BLOCK_N, BLOCK_K,
    )  # fmt: skip
    stored = (k < K)[None, :] if FAR else row_mask[:, None] & (k < K)[None, :]
    tl.store(out + rows[:, None] * K + k[None, :], w, mask=stored)
