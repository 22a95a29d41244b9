"""RMSNorm of few rows on a CPU as one loop.

Shapes: M rows, D features.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from oxillama_torch.kernels.few_rows import MAX_ROWS, OPTIONS, Readiness
from oxillama_torch.kernels.norm import reference
from oxillama_torch.kernels.program import Program
from oxillama_torch.kernels.registry import register

__all__ = ["prepare", "rms_norm"]

_readiness = Readiness("rms_norm")


@register(
    "rms_norm",
    "compiled",
    devices=("cpu",),
    numerics=("fast",),
    m=(1, MAX_ROWS),
    capability=_readiness.cannot,
    unless_asked=_readiness.not_by_default,
    priority=2,
)
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Arguments as those of :func:`oxillama_torch.kernels.norm.op.rms_norm`."""
    if residual is None:
        return _plain()(x, weight, _scalar(eps))
    return _with_residual()(x, residual, weight, _scalar(eps))


def prepare(*, even_if_small: bool) -> None:
    """Compile what a model's norms need.

    Args:
        even_if_small: also where no rule asks for this backend.
    """
    if not _readiness.wanted(even_if_small):
        return
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 3, 40, generator=generator)
    weight = torch.rand(40, generator=generator)
    for key, extra in (("plain", None), ("residual", residual)):
        _readiness.prepare(
            key,
            *(
                functools.partial(kernel, x, weight, 1e-6, residual=extra)
                for kernel in (rms_norm, reference.rms_norm)
            ),
        )


def _normed(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _summed(x: Tensor, residual: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _normed(total, weight, eps), total


@functools.cache
def _plain() -> Program:
    return Program(_normed, "rms_norm", [("M", "D"), ("D",), (1,)], options=OPTIONS)


@functools.cache
def _with_residual() -> Program:
    shapes = [("M", "D"), ("M", "D"), ("D",), (1,)]
    return Program(_summed, "rms_norm_residual", shapes, options=OPTIONS)


@functools.cache
def _scalar(value: float) -> Tensor:
    """As an argument, so that one program serves every value."""
    return torch.tensor([value])
