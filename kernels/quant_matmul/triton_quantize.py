"""8-bit activations for the integer matmul: one scale and one sum per 32 values, as ggml's Q8_1.

``d = max |x| / 127``, ``q = round(x / d)`` (half to even), ``s = d * sum(q)``. The scale stays in
float32, where ggml rounds it to float16.

Shapes: M rows, K values per row, a multiple of 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.kernels.triton_support import launch_device, pdl_begin, pdl_options

__all__ = [
    "GROUP",
    "empty_integers",
    "integers_of",
    "quantize",
    "quantize_kernel",
    "store_quantized",
]

GROUP = 32
BLOCK_GROUPS = 32
NUM_WARPS = 4


@triton.jit
def quantize_kernel(
    x, x_stride, values, scales, sums, K,
    GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j): groups of tile j of row i."""
    m = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pdl_begin(USE_PDL)
    v = tl.load(x + m * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    store_quantized(v, k, group, m, values, scales, sums, K, GROUP)


@triton.jit
def store_quantized(v, k, group, m, values, scales, sums, K, GROUP: tl.constexpr):
    """Quantize and store groups of row m: v float32, k their places [groups, GROUP]; 0 from K on.

    group [groups].
    """
    d = tl.max(tl.abs(v), axis=1) / 127.0
    inverse = 1.0 / tl.where(d > 0.0, d, 1.0)
    # Adding 1.5 * 2**23 leaves the nearest integer in the low bits of the sum.
    q = (v * inverse[:, None] + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    tl.store(values + m * K + k, q.to(tl.int8), mask=k < K)
    at = m * (K // GROUP) + group
    tl.store(scales + at, d, mask=group < K // GROUP)
    tl.store(sums + at, d * tl.sum(q, axis=1).to(tl.float32), mask=group < K // GROUP)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize activations.

    Args:
        x: floating [M, K], its rows contiguous.

    Returns:
        values int8 [M, K]; scales and sums float32 [M, K / 32].
    """
    (rows, inputs), groups = x.shape, x.shape[1] // GROUP
    values, scales, sums = empty_integers(x)
    with launch_device(x):
        quantize_kernel[(rows, triton.cdiv(groups, BLOCK_GROUPS))](
            x, x.stride(0), values, scales, sums, inputs,
            GROUP=GROUP, BLOCK_GROUPS=BLOCK_GROUPS, num_warps=NUM_WARPS,
            **pdl_options(x.device),
        )  # fmt: skip
    return values, scales, sums


def empty_integers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for what ``quantize`` returns for ``x`` [M, K]."""
    rows, inputs = x.shape
    values = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
    scales, sums = torch.empty(2, rows, inputs // GROUP, dtype=torch.float32, device=x.device)
    return values, scales, sums


def integers_of(
    x: torch.Tensor, quantized: QuantizedRows | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``quantize(x)`` returns, if it is there already as it is."""
    return quantize(x) if quantized is None else quantized.integers
