"""Launcher of the gated activation.

Shapes: M rows, F features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry

__all__ = ["KINDS", "gated"]

KINDS = ("silu", "gelu", "gelu_tanh")

registry.declare(
    "gated",
    "oxillama_torch.kernels.activation.reference",
)


def gated(
    gate: torch.Tensor, up: torch.Tensor, kind: str, *, numerics: str = "invariant"
) -> torch.Tensor:
    """``act(gate) * up`` in float32, rounded once to the inputs' dtype (SwiGLU, GeGLU).

    Args:
        gate, up: float32, bfloat16 or float16 [M, F]; rows may be strided (halves of one tensor).
        kind: ``"silu"``, ``"gelu"`` (erf) or ``"gelu_tanh"``.
        numerics: ``"invariant"`` or ``"fast"``.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or the kind is unknown.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    if kind not in KINDS:
        raise ValueError(f"activation kind {kind!r}: one of {', '.join(KINDS)} is wanted")
    if gate.ndim != 2 or gate.shape != up.shape:
        raise ValueError(
            f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: both must be one [M, F]"
        )
    if gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(
            f"gate is {gate.dtype} on {gate.device}, up is {up.dtype} on {up.device}: "
            "they must agree"
        )
    if gate.stride(-1) != 1 or up.stride(-1) != 1:
        raise ValueError("gate and up must be contiguous along their last dimension")
    if gate.numel() == 0:
        return gate.new_empty(gate.shape)
    call = registry.Call(gate.device.type, gate.dtype, numerics, m=gate.shape[0])
    return registry.select("gated", call).function(gate, up, kind)
