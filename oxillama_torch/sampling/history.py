"""Which tokens a request has seen, and how often: what the penalties look at."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence

import numpy as np

__all__ = ["TokenHistory"]

_FIRST_CAPACITY = 64


class TokenHistory:
    """Distinct tokens of a request and how often each occurred, as growing arrays.

    Args:
        prompt_token_ids: the prompt, or nothing if it does not matter.
        window: count the last ``window`` tokens, those of the prompt included; None: tokens of the
            prompt are known but not counted, and nothing is forgotten.
    """

    def __init__(self, prompt_token_ids: Sequence[int] = (), window: int | None = None) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.zeros(_FIRST_CAPACITY, np.int64)
        self._counts = np.zeros(_FIRST_CAPACITY, np.int64)
        self._window = window
        self._recent: deque[int] = deque()
        if window is None:
            for token_id in prompt_token_ids:
                self._slot(token_id)
        else:
            for token_id in prompt_token_ids[-window:] if window else ():
                self.add(token_id)

    @property
    def ids(self) -> np.ndarray:
        """int64 [distinct tokens]."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> np.ndarray:
        """int64 [distinct tokens]: occurrences; 0 for tokens of an uncounted prompt."""
        return self._counts[: len(self._index)]

    def penalised(self) -> tuple[np.ndarray, np.ndarray]:
        """``ids`` and ``counts`` of the tokens that penalties are for."""
        if self._window is None:
            return self.ids, self.counts
        inside = self.counts > 0
        return self.ids[inside], self.counts[inside]

    def add(self, token_id: int) -> None:
        """Count one token."""
        slot = self._slot(token_id)  # may replace the arrays
        self._counts[slot] += 1
        if self._window is not None:
            self._recent.append(token_id)
            if len(self._recent) > self._window:
                self._counts[self._index[self._recent.popleft()]] -= 1

    def copy(self) -> TokenHistory:
        """One that goes its own way from here."""
        other = copy.copy(self)
        other._index, other._recent = self._index.copy(), self._recent.copy()
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    def _slot(self, token_id: int) -> int:
        slot = self._index.setdefault(token_id, len(self._index))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        return slot
