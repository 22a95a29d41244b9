"""Fused products one by one: as references, and through whatever serves each of them best.

Shapes: see ``fused``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from oxillama_torch.kernels.activation import reference as activation_reference
from oxillama_torch.kernels.activation.op import gated
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul import reference
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import register

__all__ = [
    "gated_reference",
    "gated_separate",
    "residual_reference",
    "residual_separate",
    "segments_reference",
    "segments_separate",
]

_SEPARATE = 1  # before the reference, after everything that is one launch


@register("quant_matmul_segments", "reference")
def segments_reference(
    x: Tensor,
    weights: Sequence[PackedTensor],
    biases: Sequence[Tensor | None],
    numerics: str = "invariant",
) -> list[Tensor]:
    """Reference of :func:`oxillama_torch.kernels.quant_matmul.fused.quant_matmul_segments`."""
    return [reference.quant_matmul(x, w, b) for w, b in zip(weights, biases)]


@register("quant_matmul_segments", "separate", priority=_SEPARATE)
def segments_separate(
    x: Tensor,
    weights: Sequence[PackedTensor],
    biases: Sequence[Tensor | None],
    numerics: str = "invariant",
) -> list[Tensor]:
    """One ``quant_matmul`` after the other."""
    return [quant_matmul(x, w, b, numerics=numerics) for w, b in zip(weights, biases)]


@register("quant_matmul_gated", "reference")
def gated_reference(
    x: Tensor, weight: PackedTensor, kind: str, numerics: str = "invariant"
) -> Tensor:
    """Reference of :func:`oxillama_torch.kernels.quant_matmul.fused.quant_matmul_gated`."""
    return activation_reference.gated(*reference.quant_matmul(x, weight).chunk(2, dim=1), kind)


@register("quant_matmul_gated", "separate", priority=_SEPARATE)
def gated_separate(
    x: Tensor, weight: PackedTensor, kind: str, numerics: str = "invariant"
) -> Tensor:
    """``quant_matmul``, then ``gated``."""
    gate, up = quant_matmul(x, weight, numerics=numerics).chunk(2, dim=1)
    return gated(gate, up, kind, numerics=numerics)


@register("quant_matmul_residual", "reference")
def residual_reference(
    x: Tensor,
    weight: PackedTensor,
    bias: Tensor | None,
    residual: Tensor,
    numerics: str = "invariant",
) -> Tensor:
    """``quant_matmul`` with a residual; see there for what is rounded when."""
    # In float32 throughout, so that nothing is rounded before the residual is added.
    product = reference.quant_matmul(x.float(), weight, bias)
    return (product + residual.float()).to(x.dtype)


@register("quant_matmul_residual", "separate", priority=_SEPARATE)
def residual_separate(
    x: Tensor,
    weight: PackedTensor,
    bias: Tensor | None,
    residual: Tensor,
    numerics: str = "invariant",
) -> Tensor:
    """``quant_matmul`` with float32 results by whatever serves it, then the sum."""
    product = quant_matmul(x.float(), weight, bias, numerics=numerics)
    return (product + residual.float()).to(x.dtype)
