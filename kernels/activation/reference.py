"""Gated activation in eager torch.

Shapes: M rows, F features.
"""

from __future__ import annotations

import math

import torch

from oxillama_torch.kernels.registry import register

__all__ = ["gated"]


# torch's silu, sigmoid and gelu round differently in the vectorised body of an array and in its
# tail, so that an element's bits would depend on how many rows lie before it. exp, tanh and erf do
# not, and the arithmetic around them is IEEE: hence the formulas are written out.


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (torch.exp(-x) + 1.0)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (torch.erf(x * math.sqrt(0.5)) + 1.0)


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return x * 0.5 * (torch.tanh(inner) + 1.0)


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


@register("gated", "reference")
def gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """``act(gate) * up``; an element's bits depend on its own two inputs alone.

    Args and errors: as ``op.gated``, which checks them.
    """
    return (_ACTIVATIONS[kind](gate.float()) * up.float()).to(gate.dtype)
