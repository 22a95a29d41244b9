"""Several adapters made into one, through peft's own utilities (``add_weighted_adapter``).

N outputs, K inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.attach import lengths
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.terms import LoraTerm, Replacement

__all__ = ["COMBINATIONS", "combine"]

_OF_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_OF_CHANGES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATIONS = (*_OF_FACTORS, "cat", *_OF_CHANGES)

#: A term and its weight.
Weighted = Sequence[tuple[LoraTerm, float]]


def combine(
    name: str,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    targets: BaseWeights,
    *,
    combination_type: str = "svd",
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
) -> Adapter:
    """A new adapter out of several; arguments mean what they mean in peft.

    DoRA follows peft too: when the first adapter has magnitudes, the new one has them, and they are
    the lengths of the model's own rows; the magnitudes of the adapters are left out.

    Args:
        name: of the new adapter.
        adapters, weights: one weight for each, negative ones too.
        combination_type: one of COMBINATIONS.
        density: share of values to keep, in (0, 1]; for all but linear, cat and svd.
        majority_sign_method: ``total`` or ``frequency``, for ties.
        svd_rank: rank of the result for svd and its kin; None: the largest there is.
        svd_clamp: quantile of the factors' values, in (0, 1], to which svd and its kin clamp them.

    Raises:
        RequestError: arguments that do not fit together.
        UnsupportedError: an unknown combination, or changes of experts or tensors saved whole.
    """
    _check(adapters, weights, combination_type, density, majority_sign_method, svd_clamp)
    kind = "linear" if len(adapters) == 1 else combination_type
    method = _method(kind.removesuffix("_svd"), density, majority_sign_method)
    rank = svd_rank or max(adapter.ranks[-1] for adapter in adapters)
    terms: dict[str, LoraTerm] = {}
    # peft goes layer by layer too: with one seed, random pruning draws the same numbers.
    for stem in targets.shapes:
        own = [(a.terms[stem], weight) for a, weight in zip(adapters, weights) if stem in a.terms]
        if not own:
            continue
        # peft holds the change of the embedding transposed
        flipped = targets.kind(stem) == "embedding"
        sides = [(_flip(term), weight) for term, weight in own] if flipped else own
        if kind == "cat":
            made = _concatenated(sides)
        elif kind in _OF_CHANGES:
            change = method([term.delta() for term, _ in own], torch.tensor([w for _, w in own]))
            made = _decomposed(change.T if flipped else change, rank, svd_clamp)
        else:
            _check_ranks(stem, own, kind)
            made = _summed(sides, method)
        terms[stem] = _flip(made) if flipped else made
        if adapters[0].uses_dora:
            terms[stem] = replace(terms[stem], magnitude=lengths(stem, targets))
    return Adapter.build(name, terms, targets)


def _check(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
    svd_clamp: float | None,
) -> None:
    if not adapters or len(adapters) != len(weights):
        raise RequestError(f"{len(adapters)} adapters and {len(weights)} weights", param="weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise RequestError("a weight is not finite", param="weights")
    if combination_type not in COMBINATIONS:
        raise UnsupportedError(f"combination {combination_type!r}", COMBINATIONS)
    if majority_sign_method not in ("total", "frequency"):
        raise UnsupportedError(f"sign method {majority_sign_method!r}", ("total", "frequency"))
    prunes = combination_type not in ("linear", "cat", "svd")
    if prunes and (density is None or not 0 < density <= 1):
        raise RequestError(f"{combination_type} wants a density in (0, 1]", param="density")
    if svd_clamp is not None and not 0 < svd_clamp <= 1:
        raise RequestError("svd_clamp is a quantile in (0, 1]", param="svd_clamp")
    for adapter in adapters:
        for stem, term in adapter.terms.items():
            if isinstance(term, Replacement) or term.lora_A.ndim == 3:
                what = "has whole" if isinstance(term, Replacement) else "changes by expert"
                raise UnsupportedError(
                    f"combining adapter {adapter.name!r}, which {what} {stem}",
                    ("low-rank changes of single matrices",),
                )


def _method(
    kind: str, density: float | None, majority_sign_method: str
) -> Callable[[list[Tensor], Tensor], Tensor]:
    from peft.utils import merge_utils

    if kind in ("linear", "svd", "cat"):
        return merge_utils.task_arithmetic
    function = getattr(merge_utils, kind)
    extra = (majority_sign_method,) if kind.endswith("ties") else ()
    return lambda tensors, weights: function(tensors, weights, density, *extra)


def _check_ranks(stem: str, own: Weighted, kind: str) -> None:
    ranks = [term.rank for term, _ in own]
    if len(set(ranks)) > 1:
        raise RequestError(
            f"{kind} wants equal ranks, those of {stem} are {', '.join(map(str, ranks))}; "
            "cat and svd take any",
            param="combination_type",
        )


def _concatenated(own: Weighted) -> LoraTerm:
    return LoraTerm(
        torch.cat([term.lora_A * weight * term.scaling for term, weight in own]),
        torch.cat([term.lora_B for term, _ in own], dim=1),
        1.0,
    )


def _flip(term: LoraTerm) -> LoraTerm:
    """The change of the transposed matrix."""
    return LoraTerm(term.lora_B.T.contiguous(), term.lora_A.T.contiguous(), term.scaling)


def _summed(own: Weighted, method: Callable[[list[Tensor], Tensor], Tensor]) -> LoraTerm:
    """Factors combined one by one; half of each weight, as a square root, goes to either."""
    full = [weight * term.scaling for term, weight in own]
    roots_B = [math.sqrt(abs(weight)) for weight in full]
    roots_A = [math.copysign(root, weight) for root, weight in zip(roots_B, full)]
    return LoraTerm(
        method([term.lora_A for term, _ in own], torch.tensor(roots_A)),
        method([term.lora_B for term, _ in own], torch.tensor(roots_B)),
        1.0,
    )


def _decomposed(change: Tensor, rank: int, clamp: float | None) -> LoraTerm:
    """The best approximation of a rank; factors clamped to a quantile of their values."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    b, a = u[:, :rank] * s[:rank], vh[:rank].contiguous()
    if clamp is not None:
        most = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        b, a = b.clamp(-most, most), a.clamp(-most, most)
    return LoraTerm(a, b, 1.0)
