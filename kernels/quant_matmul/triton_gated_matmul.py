"""Gate and up projection with the activation between them in one launch.

A program computes the same tile of both products, in the order of ``gemm_kernel`` or
``dp4a_kernel``, and writes ``act(gate) * up``: half of the outputs, and no second pass over them.

Shapes: M rows, K inputs, F features. x [M, K], out [M, F]; planes of gate's F rows, then of up's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.activation.triton_gated import activate
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.configs import (
    DP4A_MAX_ROWS,
    Config,
    block_k,
    dp4a_config,
    gemm_config,
    invariant_config,
)
from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS
from oxillama_torch.kernels.quant_matmul.fused import left_to_others
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.kernels.quant_matmul.triton_dp4a import dp4a_tile
from oxillama_torch.kernels.quant_matmul.triton_quantize import integers_of
from oxillama_torch.kernels.registry import Call, register
from oxillama_torch.kernels.triton_support import (
    DEVICES,
    INTERPRET,
    dot_dtype,
    launch_device,
    pdl_begin,
    pdl_options,
    pdl_prefetch,
    priority,
)

__all__ = ["dp4a_gated_kernel", "gemm_gated_kernel", "launch_dp4a", "launch_gemm"]

# Two sums per output: larger tiles do not fit in registers.
_MOST_ROWS_OF_A_TILE = 64


@triton.jit
def gemm_gated_kernel(
    x, x_stride, p0, p1, p2, p3, s0, s1, s2, s3, out, M, F, K,
    DECODE: tl.constexpr, KIND: tl.constexpr, DOT_DTYPE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): features of tile i for rows of tile j."""
    f = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    pdl_prefetch(p0, s0, first, 2 * F, BLOCK_N, USE_PDL)
    pdl_prefetch(p0, s0, first + F, 2 * F, BLOCK_N, USE_PDL)
    pdl_begin(USE_PDL)
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        mask = (m < M)[None, :]
        if not EVEN_K:
            mask = mask & (k < K)[:, None]
        xt = tl.load(x + m[None, :] * x_stride + k[:, None], mask=mask, other=0.0).to(DOT_DTYPE)
        w = DECODE(p0, p1, p2, p3, s0, s1, s2, s3, f, f < F, k0, K, BLOCK_N, BLOCK_K)
        gate = tl.dot(w.to(DOT_DTYPE), xt, gate, input_precision="ieee")
        w = DECODE(p0, p1, p2, p3, s0, s1, s2, s3, f + F, f < F, k0, K, BLOCK_N, BLOCK_K)
        up = tl.dot(w.to(DOT_DTYPE), xt, up, input_precision="ieee")
    dtype = out.dtype.element_ty
    y = activate(gate.to(dtype).to(tl.float32), KIND) * up.to(dtype).to(tl.float32)
    mask = (f < F)[:, None] & (m < M)[None, :]
    tl.store(out + m[None, :] * F + f[:, None], y.to(dtype), mask=mask)


@triton.jit
def dp4a_gated_kernel(
    x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, out, M, F, K,
    UNIT: tl.constexpr, UNIT_WEIGHTS: tl.constexpr, KIND: tl.constexpr, USE_ASM: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program i: features of tile i // M for row i % M."""
    m = (tl.program_id(0) % M).to(tl.int64)
    first = (tl.program_id(0) // M).to(tl.int64) * BLOCK_N
    f = first + tl.arange(0, BLOCK_N)
    pdl_prefetch(p0, s0, first, 2 * F, BLOCK_N, USE_PDL)
    pdl_prefetch(p0, s0, first + F, 2 * F, BLOCK_N, USE_PDL)
    pdl_begin(USE_PDL)
    gate = dp4a_tile(
        f, m, x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, F, K,
        UNIT, UNIT_WEIGHTS, USE_ASM, EVEN_K, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    rows = tl.where(f < F, f + F, 2 * F)  # beyond the last feature: beyond the last row
    up = dp4a_tile(
        rows, m, x, x_scales, x_sums, p0, p1, p2, p3, s0, s1, s2, s3, 2 * F, K,
        UNIT, UNIT_WEIGHTS, USE_ASM, EVEN_K, BLOCK_N, BLOCK_U,
    )  # fmt: skip
    dtype = out.dtype.element_ty
    y = activate(gate.to(dtype).to(tl.float32), KIND) * up.to(dtype).to(tl.float32)
    tl.store(out + m * F + f, y.to(dtype), mask=f < F)


def launch_gemm(x: torch.Tensor, weight: PackedTensor, kind: str, config: Config) -> torch.Tensor:
    """Run the tensor-core kernel with one config; arguments as the op's."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), features = x.shape, weight.shape[0] // 2
    out = x.new_empty(rows, features)
    tile, dot = block_k(weight.format, inputs, config.block_k), dot_dtype(x.dtype)
    grid = (triton.cdiv(features, config.block_n), triton.cdiv(rows, config.block_m))
    with launch_device(x):
        gemm_gated_kernel[grid](
            x, x.stride(0), *weight.tile_args(), out, rows, features, inputs,
            DECODE=weight.format.decoder(dot == tl.bfloat16), KIND=kind, DOT_DTYPE=dot,
            EVEN_K=inputs % tile == 0,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=tile,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return out


def launch_dp4a(
    x: torch.Tensor,
    weight: PackedTensor,
    kind: str,
    config: Config,
    quantized: QuantizedRows | None = None,
) -> torch.Tensor:
    """Quantize x, if it is not yet, and run the integer kernel; ``block_k`` counts units."""
    x = x if x.stride(1) == 1 else x.contiguous()
    (rows, inputs), features = x.shape, weight.shape[0] // 2
    out = x.new_empty(rows, features)
    unit, unit_weights = UNITS[weight.format.name]
    with launch_device(x):
        dp4a_gated_kernel[(rows * triton.cdiv(features, config.block_n),)](
            *integers_of(x, quantized), *weight.tile_args(), out, rows, features, inputs,
            UNIT=unit, UNIT_WEIGHTS=unit_weights, KIND=kind, USE_ASM=not INTERPRET,
            EVEN_K=inputs % (unit_weights * config.block_k) == 0,
            BLOCK_N=config.block_n, BLOCK_U=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return out


def _integer(call: Call) -> str | None:
    return None if call.type in UNITS else f"has no integer form of {call.type}"


_LEFT = left_to_others("quant_matmul", "gated")


@register(
    "quant_matmul_gated",
    "triton.invariant",
    devices=DEVICES,
    unless_asked=_LEFT,
    priority=priority(0),
)
def gated_invariant(x, weight, kind, numerics="invariant") -> torch.Tensor:
    """The tiles of ``quant_matmul``'s invariant kernel, so that bits are the same as without."""
    return launch_gemm(x, weight, kind, invariant_config(weight))


@register(
    "quant_matmul_gated",
    "triton.gemm",
    devices=DEVICES,
    numerics=("fast",),
    unless_asked=_LEFT,
    priority=priority(1),
)
def gated_gemm(x, weight, kind, numerics="fast") -> torch.Tensor:
    """Tiles chosen by the number of rows."""
    rows = min(len(x), _MOST_ROWS_OF_A_TILE)
    return launch_gemm(x, weight, kind, gemm_config(weight, rows, x.dtype))


@register(
    "quant_matmul_gated",
    "triton.dp4a",
    m=(1, DP4A_MAX_ROWS),
    devices=DEVICES,
    numerics=("fast",),
    capability=_integer,
    unless_asked=_LEFT,
    priority=priority(2),
    error=4e-2,
    takes_quantized=True,
)
def gated_dp4a(x, weight, kind, numerics="fast", quantized=None) -> torch.Tensor:
    """One program per row and feature tile."""
    return launch_dp4a(x, weight, kind, dp4a_config(weight, len(x)), quantized)
