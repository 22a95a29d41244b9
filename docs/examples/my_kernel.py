"""A user's own matmul kernel: one file, registered by running it (see docs/own-kernel.md)."""

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.registry import register


@triton.jit
def row_kernel(
    x, p0, p1, p2, p3, s0, s1, s2, s3, bias, out, N, K,
    DECODE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, m): outputs i * BLOCK_N .. of row m."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        w = DECODE(p0, p1, p2, p3, s0, s1, s2, s3, n, n < N, k0, K, BLOCK_N, BLOCK_K)
        row = tl.load(x + m * K + k0 + tl.arange(0, BLOCK_K)).to(tl.float32)
        total += tl.sum(w * row[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=n < N)


@register("quant_matmul", "mine", types={"Q8_0", "Q4_K"}, m=(1, 32), priority=-1000)
def quant_matmul(x, weight, bias=None):
    """Row by row; a negative priority, so that it runs only when a rule asks for it."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    row_kernel[(triton.cdiv(n, 64), m)](
        x.contiguous(), *weight.tile_args(), out if bias is None else bias, out, n, k,
        DECODE=weight.format.decode_tile, HAS_BIAS=bias is not None, BLOCK_N=64, BLOCK_K=256,
    )  # fmt: skip
    return out
