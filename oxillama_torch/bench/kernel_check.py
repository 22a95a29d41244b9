"""Compare a backend with the reference of its op: on random operands, or on a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oxillama_torch.bench.cases import Case
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.registry import Kernel

__all__ = ["Check", "check_case"]

# Relative L2 error allowed, by dtype of the activations: the rounding of the result, and where
# tensor cores want it, of the weights.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True, slots=True)
class Check:
    """Errors of one backend against the reference.

    Args:
        refused: why the backend does not serve the call; the rest is then empty.
        bound: the relative L2 error allowed.
    """

    refused: str | None = None
    max_abs: float = 0.0
    relative_l2: float = 0.0
    cosine: float = 1.0
    nans: int = 0
    bound: float = 0.0

    @property
    def passed(self) -> bool:
        """Served, free of NaN and within the bound."""
        return self.refused is None and not self.nans and self.relative_l2 <= self.bound


def check_case(kernel: Kernel, case: Case) -> Check:
    """Run a backend and the reference on the same operands.

    Where a call gives several tensors, each is compared and the worst figures are reported.
    """
    calls = [case.call._replace(numerics=numerics) for numerics in ("invariant", "fast")]
    reasons = [kernel.refuse(call) for call in calls]
    if all(reasons):
        return Check(refused=reasons[0])
    reference = next(
        k for k, _ in registry.candidates(case.op, case.call) if k.backend == "reference"
    )
    bound = _BOUNDS[case.call.dtype] + kernel.error
    pairs = zip(case.run(kernel), case.run(reference), strict=True)
    return _worst([_compare(got, wanted) for got, wanted in pairs], bound)


def _compare(got: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float, float, int]:
    """(max abs error, relative L2 error, cosine, NaN that the reference has not)."""
    nans = int((got.isnan() & ~wanted.isnan()).sum())
    got, wanted = got.double().nan_to_num(), wanted.double().nan_to_num()
    error, norm = got - wanted, wanted.norm()
    if not norm:  # nothing to be relative to
        return error.abs().max().item(), error.norm().item(), 1.0, nans
    cosine = torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0)
    return error.abs().max().item(), (error.norm() / norm).item(), cosine.item(), nans


def _worst(found: Sequence[tuple[float, float, float, int]], bound: float) -> Check:
    max_abs, relative, cosine, nans = zip(*found, strict=True)
    return Check(None, max(max_abs), max(relative), min(cosine), sum(nans), bound)
