"""Matmul with packed weights on tensor cores, any number of rows.

A program computes out^T = W X^T for one tile: the dequantized weights are the first operand of
``tl.dot``, so that they go from the decoder to the tensor cores in registers; as second operand
they would pass through shared memory. Rows of x are the narrow side and need no padding beyond 16.

Shapes: M rows, K inputs, N outputs. x [M, K], out [M, N], weight planes [N, ...].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.configs import (
    Config,
    block_k,
    gemm_config,
    invariant_config,
)
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    dot_dtype,
    launch_device,
    pdl_begin,
    pdl_options,
    pdl_prefetch,
    priority,
)

__all__ = ["gemm_kernel", "gemm_tile", "launch", "tile_product"]


@triton.jit
def tile_product(
    x, x_stride, x_rows, x_mask,
    p0, p1, p2, p3, s0, s1, s2, s3, w_rows, w_mask, K,
    DECODE: tl.constexpr, DOT_DTYPE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W[w_rows] @ x[x_rows]^T -> float32 [BLOCK_N, BLOCK_M]; masked rows count as zeros."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        w = DECODE(
            p0, p1, p2, p3, s0, s1, s2, s3, w_rows, w_mask, k0, K, BLOCK_N, BLOCK_K
        )  # fmt: skip
        k = k0 + tl.arange(0, BLOCK_K)
        mask = x_mask[None, :]
        if not EVEN_K:
            mask = mask & (k < K)[:, None]
        xt = tl.load(x + x_rows[None, :] * x_stride + k[:, None], mask=mask, other=0.0)
        acc = tl.dot(w.to(DOT_DTYPE), xt.to(DOT_DTYPE), acc, input_precision="ieee")
    return acc


@triton.jit
def gemm_tile(
    n_tile, m_tile, x, x_stride, p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, M, N, K,
    DECODE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of out."""
    n = n_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tile_product(
        x, x_stride, m, m < M, p0, p1, p2, p3, s0, s1, s2, s3, n, n < N, K,
        DECODE, DOT_DTYPE, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    at = m[None, :] * N + n[:, None]
    if HAS_RESIDUAL:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gemm_kernel(
    x, x_stride, p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, M, N, K,
    DECODE: tl.constexpr, DOT_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs of tile i for rows of tile j."""
    pdl_prefetch(p0, s0, tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N, USE_PDL)
    pdl_begin(USE_PDL)
    gemm_tile(
        tl.program_id(0), tl.program_id(1), x, x_stride,
        p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, M, N, K,
        DECODE, DOT_DTYPE, HAS_BIAS, HAS_RESIDUAL, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: PackedTensor,
    bias: torch.Tensor | None,
    config: Config,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel with one config; arguments as the ops'."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = x.new_empty(rows, outputs)
    tile, dot = block_k(weight.format, inputs, config.block_k), dot_dtype(x.dtype)
    grid = (triton.cdiv(outputs, config.block_n), triton.cdiv(rows, config.block_m))
    with launch_device(x):
        gemm_kernel[grid](
            x, x.stride(0), *weight.tile_args(), out if bias is None else bias,
            out if residual is None else residual.contiguous(), out, rows, outputs, inputs,
            DECODE=weight.format.decoder(dot == tl.bfloat16), DOT_DTYPE=dot,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            EVEN_K=inputs % tile == 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=tile,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return out


@register("quant_matmul", "triton.gemm", devices=DEVICES, numerics=("fast",), priority=priority(1))
def quant_matmul_fast(
    x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Tiles chosen by the number of rows; a row's bits may change with it."""
    return launch(x, weight, bias, gemm_config(weight, x.shape[0], x.dtype))


@register("quant_matmul", "triton.invariant", devices=DEVICES, priority=priority(0))
def quant_matmul_invariant(
    x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same tiles for every number of rows: a row's bits depend on that row alone."""
    return launch(x, weight, bias, invariant_config(weight))
