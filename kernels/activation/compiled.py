"""Gated activation of few rows on a CPU as one loop.

Shapes: M rows, F features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from oxillama_torch.kernels.activation import reference
from oxillama_torch.kernels.few_rows import MAX_ROWS, OPTIONS, Readiness
from oxillama_torch.kernels.program import Program
from oxillama_torch.kernels.registry import register

__all__ = ["gated", "prepare"]

_readiness = Readiness("gated")


@register(
    "gated",
    "compiled",
    devices=("cpu",),
    numerics=("fast",),
    m=(1, MAX_ROWS),
    capability=_readiness.cannot,
    unless_asked=_readiness.not_by_default,
    priority=2,
)
def gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Arguments as those of :func:`oxillama_torch.kernels.activation.op.gated`."""
    # Halves of several rows of one product are strided.
    return _program(kind)(gate.contiguous(), up.contiguous())


def prepare(kind: str, *, even_if_small: bool) -> None:
    """Compile an activation.

    Args:
        kind: of the model's feed-forward layers.
        even_if_small: also where no rule asks for this backend.
    """
    if not _readiness.wanted(even_if_small):
        return
    gate, up = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    kernels = (gated, reference.gated)
    _readiness.prepare(kind, *(functools.partial(kernel, gate, up, kind) for kernel in kernels))


@functools.cache
def _program(kind: str) -> Program:
    def activate(gate: Tensor, up: Tensor) -> Tensor:
        return reference.gated(gate, up, kind)

    return Program(activate, f"gated_{kind}", [("M", "F"), ("M", "F")], options=OPTIONS)
