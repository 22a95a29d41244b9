"""Matmul with packed weights for few rows in integers: 8-bit activations, four products at a time.

x is quantized to int8 with a scale per 32 values; weights stay the small integers they are stored
as, and ``dp4a`` multiplies and adds four pairs in one instruction. Scales are applied once for each
16 or 32 weights. One thread owns whole groups, so that sums stay inside a thread until the end.
``fast`` numerics only: the result has the error of 8-bit activations, as llama.cpp's has.

Shapes: M rows, K inputs, N outputs. x [M, K], out [M, N], weight planes [N, ...].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.configs import DP4A_MAX_ROWS, Config, dp4a_config
from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.kernels.quant_matmul.triton_quantize import integers_of
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    INTERPRET,
    launch_device,
    pdl_begin,
    pdl_options,
    pdl_prefetch,
    priority,
)

__all__ = ["dp4a_kernel", "dp4a_store", "dp4a_tile", "launch"]


@triton.jit
def dp4a_tile(
    n, m, x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, N, K,
    UNIT: tl.constexpr, UNIT_WEIGHTS: tl.constexpr, USE_ASM: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Row m of x with rows n of W: float32 [BLOCK_N]."""
    units = K // UNIT_WEIGHTS
    acc = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    for first in range(0, units, BLOCK_U):
        u = first + tl.arange(0, BLOCK_U)
        x_mask = u >= 0 if EVEN_K else u < units
        acc += UNIT(
            p0, p1, p2, p3, s0, s1, s2, s3, n, u, (n < N)[:, None] & x_mask[None, :],
            x + m * K, x_scales + m * (K // 32), x_sums + m * (K // 32), x_mask, USE_ASM,
        )  # fmt: skip
    return tl.sum(acc, axis=1)


@triton.jit
def dp4a_store(
    tile, m, x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, N, K,
    UNIT: tl.constexpr, UNIT_WEIGHTS: tl.constexpr, USE_ASM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute and store one tile of outputs for row m of x."""
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = dp4a_tile(
        n, m, x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, N, K,
        UNIT, UNIT_WEIGHTS, USE_ASM, EVEN_K, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual + m * N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def dp4a_kernel(
    x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, M, N, K,
    UNIT: tl.constexpr, UNIT_WEIGHTS: tl.constexpr, USE_ASM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program i: outputs of tile i // M for row i % M; rows of one tile share W in the cache."""
    m = (tl.program_id(0) % M).to(tl.int64)
    pdl_prefetch(p0, s0, (tl.program_id(0) // M).to(tl.int64) * BLOCK_N, N, BLOCK_N, USE_PDL)
    pdl_begin(USE_PDL)
    dp4a_store(
        tl.program_id(0) // M, m, x, x_scales, x_sums,
        p0, p1, p2, p3, s0, s1, s2, s3, bias, residual, out, N, K,
        UNIT, UNIT_WEIGHTS, USE_ASM, HAS_BIAS, HAS_RESIDUAL, EVEN_K, BLOCK_N, BLOCK_U,
    )  # fmt: skip


def launch(
    x: torch.Tensor,
    weight: PackedTensor,
    bias: torch.Tensor | None,
    config: Config,
    quantized: QuantizedRows | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x, if it is not yet, and run the kernel; ``config.block_k`` counts units.

    Arguments as the ops'.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = x.new_empty(rows, outputs)
    unit, unit_weights = UNITS[weight.format.name]
    with launch_device(x):
        dp4a_kernel[(rows * triton.cdiv(outputs, config.block_n),)](
            *integers_of(x, quantized), *weight.tile_args(), out if bias is None else bias,
            out if residual is None else residual.contiguous(), out, rows, outputs, inputs,
            UNIT=unit, UNIT_WEIGHTS=unit_weights, USE_ASM=not INTERPRET,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            EVEN_K=inputs % (unit_weights * config.block_k) == 0,
            BLOCK_N=config.block_n, BLOCK_U=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return out


@register(
    "quant_matmul",
    "triton.dp4a",
    types=set(UNITS),
    m=(1, DP4A_MAX_ROWS),
    devices=DEVICES,
    numerics=("fast",),
    priority=priority(3),
    error=2e-2,
    takes_quantized=True,
)
def quant_matmul(
    x: torch.Tensor,
    weight: PackedTensor,
    bias: torch.Tensor | None = None,
    quantized: QuantizedRows | None = None,
) -> torch.Tensor:
    """One program per row and output tile."""
    return launch(x, weight, bias, dp4a_config(weight, x.shape[0]), quantized)
