"""Matmul with packed weights for one or two rows, without tensor cores.

A program holds BLOCK_N rows of W. Each thread multiplies the weights it decodes with its part of x
in float32 and keeps its own sums; they are added across threads once, after the loop. Weights are
not rounded to the dtype of x, as a tensor core would want.

Shapes: M rows, K inputs, N outputs. x [M, K], out [M, N], weight planes [N, ...].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.configs import (
    GEMV_MAX_ROWS,
    Config,
    block_k,
    gemv_config,
)
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    launch_device,
    pdl_begin,
    pdl_options,
    pdl_prefetch,
    priority,
)

__all__ = ["gemv_kernel", "launch"]


@triton.jit
def gemv_kernel(
    x, x_stride, p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, N, K,
    DECODE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs of tile i for row j."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64)
    pdl_prefetch(p0, s0, tl.program_id(0).to(tl.int64) * BLOCK_N, N, BLOCK_N, USE_PDL)
    pdl_begin(USE_PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        w = DECODE(
            p0, p1, p2, p3, s0, s1, s2, s3, n, n < N, k0, K, BLOCK_N, BLOCK_K
        )  # fmt: skip
        k = k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            row = tl.load(x + m * x_stride + k)
        else:
            row = tl.load(x + m * x_stride + k, mask=k < K, other=0.0)
        acc += w * row.to(tl.float32)[None, :]
    y = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + m * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=n < N)


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
    tile = block_k(weight.format, inputs, config.block_k)
    with launch_device(x):
        gemv_kernel[(triton.cdiv(outputs, config.block_n), rows)](
            x, x.stride(0), *weight.tile_args(), out if bias is None else bias,
            out if residual is None else residual.contiguous(), out, outputs, inputs,
            DECODE=weight.format.decode_tile,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            EVEN_K=inputs % tile == 0,
            BLOCK_N=config.block_n, BLOCK_K=tile,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return out


@register(
    "quant_matmul",
    "triton.gemv",
    m=(1, GEMV_MAX_ROWS),
    devices=DEVICES,
    numerics=("fast",),
    priority=priority(2),
)
def quant_matmul(
    x: torch.Tensor, weight: PackedTensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """One program per output tile and row."""
    return launch(x, weight, bias, gemv_config(weight, x.shape[0]))
