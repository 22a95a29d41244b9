"""The tokens that some rows may still choose, while the steps of the chain drop more and more.

They are dense at first: one column per token of the vocabulary. The first step that keeps a bounded
number of the likeliest makes them compact: a few columns in order of likelihood, with their ids.
Everything after that costs next to nothing.

Shapes: D rows, V vocabulary, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from oxillama_torch.sampling.fixed_point import ordered_keys, weights
from oxillama_torch.sampling.row import SamplingRow

__all__ = ["Candidates", "likeliest"]

#: With more columns than this share of the vocabulary, drawing goes over all of it.
_DENSE_SHARE = 16


class Candidates:
    """Candidates of rows that take the same steps.

    Args:
        logits: float32 [D, V], left as it is.
        rows: one per row.
        places: lines of the step's result.
        relative: make logits relative to the highest first, so that dividing them by a tiny
            temperature cannot overflow. Not where penalties come later: they look at the sign.

    Attributes:
        x: float32 [D, C], logits; minus infinity: dropped.
        ids: int64 [D, C], or None while dense. Compact columns are in descending order of logits,
            equal ones in order of their ids, with what a later step dropped among them.
        last: set for the last step, after which only the weights matter.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        rows: Sequence[SamplingRow],
        places: Sequence[int],
        *,
        relative: bool,
    ) -> None:
        self.rows, self.places = list(rows), list(places)
        self.vocabulary = logits.shape[-1]
        self.ids: torch.Tensor | None = None
        self.last = False
        self._mass: torch.Tensor | None = None
        self._peak: torch.Tensor | None = logits.amax(-1, keepdim=True)
        self.x, self._owned, self._relative = logits, False, relative
        self._at_zero = relative  # whether the highest logit is 0
        if relative:
            self.x, self._owned = logits - self._peak, True
            self._peak = torch.zeros_like(self._peak)

    @property
    def peak(self) -> torch.Tensor:
        """float32 [D, 1]: the highest logit."""
        if self._peak is None:
            self._peak = self.x.amax(-1, keepdim=True)
        return self._peak

    @property
    def mass(self) -> torch.Tensor:
        """int64 [D, C]: weights, ``fixed_point.ONE`` for the likeliest token, 0 for dropped."""
        if self._mass is None:
            self._mass = weights(self.x, self.peak)
        return self._mass

    def column(self, name: str) -> torch.Tensor:
        """float64 [D, 1]: a parameter of each row."""
        return self.per_row([getattr(row.params, name) for row in self.rows])

    def per_row(self, values: Sequence[float] | np.ndarray) -> torch.Tensor:
        """Numbers of the host as float64 [D, 1]."""
        column = torch.from_numpy(np.asarray(values, np.float64)[:, None])
        return column.to(self.x.device)

    def largest(self, name: str) -> int:
        """The largest of a whole-number parameter, at most the number of columns."""
        return min(max(getattr(row.params, name) for row in self.rows), self.x.shape[-1])

    def drop(self, gone: torch.Tensor, *, peak: bool = False) -> None:
        """Drop candidates.

        Args:
            gone: bool [D, C].
            peak: the likeliest may be among them.
        """
        if peak:
            self._peak = self._mass = None
            self._at_zero = False
        elif self._mass is not None or self.last:
            self._mass = self.mass.masked_fill_(gone, 0)
        if peak or not self.last:
            if not self._owned:
                self.x, self._owned = self.x.clone(), True
            self.x.masked_fill_(gone, -torch.inf)

    def scale(self, temperature: torch.Tensor) -> None:
        """Divide logits by a temperature, float32 [D, 1]."""
        if not self._relative:
            self.replace(self.x / temperature)
            return
        if not self._at_zero:  # or what is far below might weigh nothing, however likely it is
            self.x.sub_(self.peak)
            self._at_zero = True
        self.x.div_(temperature)
        self._mass, self._peak = None, torch.zeros_like(self.peak)

    def replace(self, x: torch.Tensor) -> None:
        """Other logits for the same columns."""
        self.x, self._owned, self._mass, self._peak = x, True, None, None
        self._at_zero = False

    def keep_columns(self, columns: torch.Tensor) -> None:
        """Keep some columns of each row, int64 [D, C]; what they leave out is dropped.

        They are in order of likelihood, unless ``sort`` is called next.
        """
        if self._mass is not None:
            self._mass = self._mass.gather(1, columns)
        self.x, self._owned = self.x.gather(1, columns), True
        self.ids = columns if self.ids is None else self.ids.gather(1, columns)

    def sort(self) -> None:
        """Bring compact columns in order of likelihood."""
        assert self.ids is not None, "dense columns are in order of their ids"
        by_id = self.ids.argsort(-1)
        order = self.x.gather(1, by_id).argsort(dim=-1, descending=True, stable=True)
        self.keep_columns(by_id.gather(1, order))

    def dense(self) -> None:
        """One column per token again."""
        if self.ids is None:
            return
        x = self.x.new_full((len(self.x), self.vocabulary), -torch.inf)
        self.replace(x.scatter_(1, self.ids, self.x))
        self.ids = None

    def first(self, count: str) -> torch.Tensor | None:
        """bool [D, C]: the likeliest ``count`` of each row; None when no row asks for any."""
        most = self.largest(count)
        if most <= 0:
            return None
        values = self.x.topk(most).values
        wanted = self.column(count).to(torch.int64)
        border = values.gather(1, (wanted - 1).clamp_(0, most - 1))
        return (self.x >= border) & (wanted > 0)

    def select(self, kept: Sequence[int]) -> Candidates:
        """Some of the rows."""
        part = Candidates.__new__(Candidates)
        index = torch.tensor(kept, device=self.x.device)
        part.rows = [self.rows[i] for i in kept]
        part.places = [self.places[i] for i in kept]
        part.vocabulary, part.last = self.vocabulary, self.last
        part._relative, part._at_zero, part._owned = self._relative, self._at_zero, True
        part.x = self.x[index]
        for name in ("ids", "_mass", "_peak"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[index])
        return part

    def by_id(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights in order of token ids, and those ids (None: all of the vocabulary).

        Nothing may be asked of the candidates afterwards.
        """
        if self._mass is None:
            self._mass = weights(self.x, self.peak, in_place=self._owned)
        if self.ids is None:
            return self.mass, None
        if self.x.shape[-1] * _DENSE_SHARE > self.vocabulary:
            mass = self.mass.new_zeros(len(self.x), self.vocabulary)
            return mass.scatter_(1, self.ids, self.mass), None
        ids, order = self.ids.sort(-1)
        return self.mass.gather(1, order), ids


def likeliest(x: torch.Tensor, size: int) -> torch.Tensor:
    """Columns of the ``size`` highest values, in order; equal values by lower column first.

    Args:
        x: float32 [D, C]; minus infinity counts as absent.

    Returns: int64 [D, size].
    """
    found = min(size + 1, x.shape[-1])
    values, columns = x.topk(found)
    columns = columns[:, :size]
    if found > size:
        # torch.topk promises no order among equal values. Inside that is mended below; of equal
        # values across the border the wrong ones may have been taken.
        border = values[:, size]
        tied = (values[:, size - 1] == border) & (border > -torch.inf)
        if bool(tied.any()):
            index = tied.nonzero()[:, 0]
            columns[index] = ordered_keys(x[index]).topk(size).indices
    columns = columns.sort(-1).values
    order = x.gather(1, columns).argsort(dim=-1, descending=True, stable=True)
    return columns.gather(1, order)
