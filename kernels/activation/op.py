"""Launcher of the gated activation.

Shapes: M rows, F features.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels import registry

__all__ = ["KINDS", "gated"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("silu", "gelu", "gelu_tanh")

registry.declare(
    "gated",
    "oxillama_torch.kernels.activation.reference",
    "oxillama_torch.kernels.activation.compiled",
    "oxillama_torch.kernels.activation.triton_gated",
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
        ValueError: an operand does not fit, or the kind is unknown; says got and wanted.

    Source: Shazeer, GLU Variants Improve Transformer, arXiv 2002.05202.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    if gate.ndim != 2:
        raise ValueError(f"gate: got {tuple(gate.shape)}, wanted (M, F)")
    if gate.dtype not in _DTYPES:
        raise ValueError(f"gate: got {gate.dtype}, wanted one of {', '.join(map(str, _DTYPES))}")
    if (up.shape, up.dtype, up.device) != (gate.shape, gate.dtype, gate.device):
        got, wanted = (f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (up, gate))
        raise ValueError(f"up: got {got}, wanted {wanted} like gate")
    for name, x in (("gate", gate), ("up", up)):
        if x.stride(1) != 1:
            raise ValueError(f"{name}: got strides {x.stride()}, wanted contiguous rows")
    if gate.numel() == 0:
        return gate.new_empty(gate.shape)
    call = registry.Call(gate.device.type, gate.dtype, numerics, m=gate.shape[0])
    return registry.select("gated", call).function(gate, up, kind)
