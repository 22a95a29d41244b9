"""The Triton matmuls with a residual added in their epilogue.

The same kernels with the same configs as without: with ``invariant`` numerics the float32 sums have
the same bits, and the residual is added to them before the one rounding.

Shapes: M rows, K inputs, N outputs. x [M, K], residual [M, N], out [M, N].
"""

from __future__ import annotations

from oxillama_torch.kernels.quant_matmul import triton_dp4a, triton_gemm, triton_gemv
from oxillama_torch.kernels.quant_matmul.configs import (
    DP4A_MAX_ROWS,
    GEMV_MAX_ROWS,
    dp4a_config,
    gemm_config,
    gemv_config,
    invariant_config,
)
from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS
from oxillama_torch.kernels.quant_matmul.fused import left_to_others
from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.triton_support import DEVICES, priority

__all__ = ["residual_dp4a", "residual_gemm", "residual_gemv", "residual_invariant"]

_OP = "quant_matmul_residual"
_SHARED = {"devices": DEVICES, "unless_asked": left_to_others("quant_matmul")}
_FAST = {**_SHARED, "numerics": ("fast",)}


@register(_OP, "triton.invariant", priority=priority(0), **_SHARED)
def residual_invariant(x, weight, bias, residual, numerics="invariant"):
    """The same tiles for every number of rows."""
    return triton_gemm.launch(x, weight, bias, invariant_config(weight), residual)


@register(_OP, "triton.gemm", priority=priority(1), **_FAST)
def residual_gemm(x, weight, bias, residual, numerics="fast"):
    """Tiles chosen by the number of rows."""
    return triton_gemm.launch(x, weight, bias, gemm_config(weight, len(x), x.dtype), residual)


@register(_OP, "triton.gemv", m=(1, GEMV_MAX_ROWS), priority=priority(2), **_FAST)
def residual_gemv(x, weight, bias, residual, numerics="fast"):
    """One program per output tile and row."""
    return triton_gemv.launch(x, weight, bias, gemv_config(weight, len(x)), residual)


@register(
    _OP,
    "triton.dp4a",
    types=set(UNITS),
    m=(1, DP4A_MAX_ROWS),
    priority=priority(3),
    error=2e-2,
    takes_quantized=True,
    **_FAST,
)
def residual_dp4a(x, weight, bias, residual, numerics="fast", quantized=None):
    """One program per row and output tile."""
    config = dp4a_config(weight, len(x))
    return triton_dp4a.launch(x, weight, bias, config, quantized, residual)
