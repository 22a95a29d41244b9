"""The weights of a model with adapters in them, piece by piece.

N outputs, K inputs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.attach import dora_factor
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.encode import Rounding, TensorReport, decode, encode, merged_type
from oxillama_torch.lora.terms import Replacement, Term

__all__ = ["Merge", "MergedTensor", "merged_bias", "merged_norm", "touching"]


@dataclass(frozen=True, slots=True)
class Merge:
    """An adapter to be merged: ``W + scale * (what the adapter changes)``, kept as ``dtype``."""

    adapter: Adapter
    scale: float
    dtype: str


def touching(merges: Sequence[Merge], stem: str) -> list[Merge]:
    """Those that change a tensor."""
    return [merge for merge in merges if stem in merge.adapter.terms]


class MergedTensor:
    """A merged matrix or stack of experts, encoded piece by piece as the last merge wants it.

    Args:
        stem: its name.
        merges: those that change it.
        base: the model.
        before: the type it had.

    Attributes:
        type_name: GGML type of the pieces.
        rounding: what encoding has cost in the pieces taken so far.
    """

    def __init__(self, stem: str, merges: Sequence[Merge], base: BaseWeights, before: str) -> None:
        self._stem, self._merges, self._base, self._before = stem, merges, base, before
        self.type_name = merged_type(merges[-1].dtype, before, base.matrix_shape(stem)[1])
        self.rounding = Rounding()

    def pieces(self) -> Iterator[Tensor]:
        """The bytes, uint8 [bytes] each, in the order of the rows."""
        for old, exact in _merged_rows(self._stem, self._merges, self._base):
            data = encode(self.type_name, exact, self._stem)
            self.rounding.add(old, exact, decode(self.type_name, data, exact))
            yield data

    def report(self) -> TensorReport:
        """What the pieces taken so far have cost."""
        return TensorReport(
            self._stem,
            self._before,
            self.type_name,
            self.rounding.weight_error,
            self.rounding.change_error,
        )


def merged_norm(stem: str, weight: Tensor, merges: Sequence[Merge]) -> Tensor:
    """The weight float32 [D] of a norm with adapters in it."""
    exact = weight.clone()
    for merge in merges:
        term = merge.adapter.terms[stem]
        exact += merge.scale * (term.weight.to(weight) - weight)
    return exact


def merged_bias(stem: str, bias: Tensor, merges: Sequence[Merge]) -> Tensor:
    """The bias float32 [N] of a layer with adapters in it."""
    exact = bias.clone()
    for merge in merges:
        term = merge.adapter.terms.get(stem)
        if isinstance(term, Replacement) and term.bias is not None:
            exact += merge.scale * (term.bias.to(bias) - bias)
    return exact


def _merged_rows(
    stem: str, merges: Sequence[Merge], base: BaseWeights
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows as they were and with the adapters in them, float32 [n, K] both."""
    terms = [(merge.adapter.terms[stem], merge.scale) for merge in merges]
    factors = [_factor(stem, term, base) for term, _ in terms]
    for rows, old in base.chunks(stem):
        exact = old.clone()
        for (term, scale), factor in zip(terms, factors):
            exact += scale * _change(term, factor, rows, old)
        yield old, exact


def _factor(stem: str, term: Term, base: BaseWeights) -> Tensor | None:
    """What DoRA multiplies rows by, [N, 1], or columns of the embedding, [D]."""
    if isinstance(term, Replacement) or term.magnitude is None:
        return None
    factor = dora_factor(stem, term, base)
    return factor if base.kind(stem) == "embedding" else factor[:, None]


def _change(term: Term, factor: Tensor | None, rows: slice, old: Tensor) -> Tensor:
    """What an adapter at scale 1 adds to rows of a weight, float32 [n, K]."""
    if isinstance(term, Replacement):
        return term.weight[rows].to(old) - old
    delta = term.delta(rows).to(old.device)
    if factor is None:
        return delta
    own = factor[rows] if factor.ndim == 2 else factor
    return own.to(old.device) * (old + delta) - old
