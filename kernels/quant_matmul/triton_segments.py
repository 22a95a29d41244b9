"""Products of one input with two weights of different types in one launch.

The first programs compute tiles of the first weight, the others those of the second: a branch on
the program's number, with both decoders compiled in. What a tile computes is what ``gemm_kernel``
or ``dp4a_kernel`` would, in the same order.

Shapes: M rows, K inputs, A and B outputs of the two weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul import triton_gemm
from oxillama_torch.kernels.quant_matmul.configs import (
    DP4A_MAX_ROWS,
    Config,
    block_k,
    dp4a_config,
    gemm_config,
    invariant_config,
)
from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS
from oxillama_torch.kernels.quant_matmul.fused import left_to_others, types_of
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.kernels.quant_matmul.triton_dp4a import dp4a_store
from oxillama_torch.kernels.quant_matmul.triton_gemm import gemm_tile
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

__all__ = ["dp4a_segments_kernel", "gemm_segments_kernel", "launch_dp4a", "launch_gemm"]


@triton.jit
def gemm_segments_kernel(
    x, x_stride, a0, a1, a2, a3, sa0, sa1, sa2, sa3, b0, b1, b2, b3, sb0, sb1, sb2, sb3,
    bias_a, bias_b, out_a, out_b, M, A, B, K,
    DECODE_A: tl.constexpr, DECODE_B: tl.constexpr, DOT_DTYPE: tl.constexpr,
    HAS_BIAS_A: tl.constexpr, HAS_BIAS_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs of tile i (of A's, then of B's) for rows of tile j."""
    tile, m_tile = tl.program_id(0), tl.program_id(1)
    tiles_a = tl.cdiv(A, BLOCK_N)
    first, is_a = tile.to(tl.int64), tile < tiles_a
    if is_a:
        pdl_prefetch(a0, sa0, first * BLOCK_N, A, BLOCK_N, USE_PDL)
    else:
        pdl_prefetch(b0, sb0, (first - tiles_a) * BLOCK_N, B, BLOCK_N, USE_PDL)
    pdl_begin(USE_PDL)
    if is_a:
        gemm_tile(
            tile, m_tile, x, x_stride, a0, a1, a2, a3, sa0, sa1, sa2, sa3,
            bias_a, out_a, out_a, M, A, K,
            DECODE_A, DOT_DTYPE, HAS_BIAS_A, False, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        gemm_tile(
            tile - tiles_a, m_tile, x, x_stride, b0, b1, b2, b3, sb0, sb1, sb2, sb3,
            bias_b, out_b, out_b, M, B, K,
            DECODE_B, DOT_DTYPE, HAS_BIAS_B, False, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def dp4a_segments_kernel(
    x, x_scales, x_sums, a0, a1, a2, a3, sa0, sa1, sa2, sa3, b0, b1, b2, b3, sb0, sb1, sb2, sb3,
    bias_a, bias_b, out_a, out_b, M, A, B, K,
    UNIT_A: tl.constexpr, UNIT_B: tl.constexpr, WEIGHTS_A: tl.constexpr, WEIGHTS_B: tl.constexpr,
    USE_ASM: tl.constexpr, HAS_BIAS_A: tl.constexpr, HAS_BIAS_B: tl.constexpr,
    EVEN_A: tl.constexpr, EVEN_B: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program i: outputs of tile i // M (of A's, then of B's) for row i % M."""
    m = (tl.program_id(0) % M).to(tl.int64)
    tile = tl.program_id(0) // M
    tiles_a = tl.cdiv(A, BLOCK_A)
    first, is_a = tile.to(tl.int64), tile < tiles_a
    if is_a:
        pdl_prefetch(a0, sa0, first * BLOCK_A, A, BLOCK_A, USE_PDL)
    else:
        pdl_prefetch(b0, sb0, (first - tiles_a) * BLOCK_B, B, BLOCK_B, USE_PDL)
    pdl_begin(USE_PDL)
    if is_a:
        dp4a_store(
            tile, m, x, x_scales, x_sums, a0, a1, a2, a3, sa0, sa1, sa2, sa3,
            bias_a, out_a, out_a, A, K,
            UNIT_A, WEIGHTS_A, USE_ASM, HAS_BIAS_A, False, EVEN_A, BLOCK_A, BLOCK_U,
        )  # fmt: skip
    else:
        dp4a_store(
            tile - tiles_a, m, x, x_scales, x_sums, b0, b1, b2, b3, sb0, sb1, sb2, sb3,
            bias_b, out_b, out_b, B, K,
            UNIT_B, WEIGHTS_B, USE_ASM, HAS_BIAS_B, False, EVEN_B, BLOCK_B, BLOCK_U,
        )  # fmt: skip


def launch_gemm(
    x: torch.Tensor,
    weights: Sequence[PackedTensor],
    biases: Sequence[torch.Tensor | None],
    config: Config,
) -> list[torch.Tensor]:
    """Run the tensor-core kernel with one config; arguments as the op's, two weights."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inputs = x.shape
    sizes = [weight.shape[0] for weight in weights]
    outs = [x.new_empty(rows, size) for size in sizes]
    tile, dot = block_k(weights[0].format, inputs, config.block_k), dot_dtype(x.dtype)
    decoders = [weight.format.decoder(dot == tl.bfloat16) for weight in weights]
    grid = (
        sum(triton.cdiv(size, config.block_n) for size in sizes),
        triton.cdiv(rows, config.block_m),
    )
    with launch_device(x):
        gemm_segments_kernel[grid](
            x, x.stride(0), *weights[0].tile_args(), *weights[1].tile_args(),
            *(out if bias is None else bias for out, bias in zip(outs, biases)), *outs,
            rows, *sizes, inputs,
            DECODE_A=decoders[0], DECODE_B=decoders[1], DOT_DTYPE=dot,
            HAS_BIAS_A=biases[0] is not None, HAS_BIAS_B=biases[1] is not None,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=tile,
            num_warps=config.num_warps, num_stages=config.num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return outs


def launch_dp4a(
    x: torch.Tensor,
    weights: Sequence[PackedTensor],
    biases: Sequence[torch.Tensor | None],
    configs: Sequence[Config],
    quantized: QuantizedRows | None = None,
) -> list[torch.Tensor]:
    """Quantize x once, if it is not yet, and run the integer kernel.

    A config per weight, the first one's launch.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inputs = x.shape
    sizes = [weight.shape[0] for weight in weights]
    outs = [x.new_empty(rows, size) for size in sizes]
    (unit_a, weights_a), (unit_b, weights_b) = (UNITS[w.format.name] for w in weights)
    blocks = [config.block_n for config in configs]
    units = configs[0].block_k
    tiles = sum(triton.cdiv(size, block) for size, block in zip(sizes, blocks))
    with launch_device(x):
        dp4a_segments_kernel[(rows * tiles,)](
            *integers_of(x, quantized), *weights[0].tile_args(), *weights[1].tile_args(),
            *(out if bias is None else bias for out, bias in zip(outs, biases)), *outs,
            rows, *sizes, inputs,
            UNIT_A=unit_a, UNIT_B=unit_b, WEIGHTS_A=weights_a, WEIGHTS_B=weights_b,
            USE_ASM=not INTERPRET,
            HAS_BIAS_A=biases[0] is not None, HAS_BIAS_B=biases[1] is not None,
            EVEN_A=inputs % (weights_a * units) == 0, EVEN_B=inputs % (weights_b * units) == 0,
            BLOCK_A=blocks[0], BLOCK_B=blocks[1], BLOCK_U=units,
            num_warps=configs[0].num_warps, num_stages=configs[0].num_stages,
            **pdl_options(x.device),
        )  # fmt: skip
    return outs


def _two_blocked(call: Call) -> str | None:
    types = types_of(call)
    if len(types) != 2:
        return f"serves two weights, not {len(types)}"
    if any(formats.get(name).block_weights == 1 for name in types):
        return "serves block-quantized types"
    return None


def _two_integer(call: Call) -> str | None:
    unknown = sorted({*types_of(call)} - {*UNITS})
    return f"has no integer form of {', '.join(unknown)}" if unknown else _two_blocked(call)


_LEFT = left_to_others("quant_matmul")


@register(
    "quant_matmul_segments",
    "triton.invariant",
    devices=DEVICES,
    capability=_two_blocked,
    unless_asked=_LEFT,
    priority=priority(0),
)
def segments_invariant(x, weights, biases, numerics="invariant") -> list[torch.Tensor]:
    """The tiles of ``quant_matmul``'s invariant kernel, so that bits are the same as without.

    Two launches where a tuned table has different tiles for the two.
    """
    configs = [invariant_config(weight) for weight in weights]
    if configs[0] != configs[1]:
        return [triton_gemm.launch(x, w, b, c) for w, b, c in zip(weights, biases, configs)]
    return launch_gemm(x, weights, biases, configs[0])


@register(
    "quant_matmul_segments",
    "triton.gemm",
    devices=DEVICES,
    numerics=("fast",),
    capability=_two_blocked,
    unless_asked=_LEFT,
    priority=priority(1),
)
def segments_gemm(x, weights, biases, numerics="fast") -> list[torch.Tensor]:
    """Tiles chosen by the number of rows."""
    return launch_gemm(x, weights, biases, gemm_config(weights[0], len(x), x.dtype))


@register(
    "quant_matmul_segments",
    "triton.dp4a",
    m=(1, DP4A_MAX_ROWS),
    devices=DEVICES,
    numerics=("fast",),
    capability=_two_integer,
    unless_asked=_LEFT,
    priority=priority(2),
    error=2e-2,
    takes_quantized=True,
)
def segments_dp4a(x, weights, biases, numerics="fast", quantized=None) -> list[torch.Tensor]:
    """One program per row and output tile."""
    configs = [dp4a_config(weight, len(x)) for weight in weights]
    return launch_dp4a(x, weights, biases, configs, quantized)
