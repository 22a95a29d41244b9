"""DRY: what would make a repetition longer is penalised, the more the longer it is.

For a token t, let n be the length of the longest suffix of the text that stands earlier in it with
t behind it. If n is at least ``allowed_length``,

    l[t] -= multiplier * base ** (n - allowed_length)

Within ``penalty_last_n`` tokens; no repetition reaches across a sequence breaker, and a token that
is one by itself is never penalised.

Source: p-e-w, text-generation-webui pull request 5677; breakers as llama.cpp has them (a head token
and the tokens that must follow it). Its Z-algorithm is replaced by one vector operation per token:
the match that ends at j is that which ended at j - 1, one longer, if token j is the new one.

Shapes: R rows, V vocabulary, N tokens of one request.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from oxillama_torch.sampling.entries import entry_index
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["RepeatTracker", "penalise_repeats", "suffix_matches"]

_FIRST_CAPACITY = 256
_LOG_FLOAT_MAX = 88.7228391

_Tails = dict[int, tuple[tuple[int, ...], ...]]


def suffix_matches(tokens: Sequence[int]) -> np.ndarray:
    """For each j, the length of the longest common suffix of ``tokens[:j + 1]`` and ``tokens``.

    Z-algorithm on the reversed tokens, O(N). The last entry, the text itself, is 0.

    Returns: int64 [N].
    """
    reversed_ids = list(tokens)[::-1]
    size = len(reversed_ids)
    z = [0] * size
    left = right = 0
    for k in range(1, size):
        length = min(right - k, z[k - left]) if k < right else 0
        while k + length < size and reversed_ids[length] == reversed_ids[k + length]:
            length += 1
        z[k] = length
        if k + length > right:
            left, right = k, k + length
    return np.array(z[::-1], np.int64)


class RepeatTracker:
    """The tokens of one request and what each next token would repeat.

    Args:
        params: the request's parameters; breakers are token sequences by now.
        prompt_token_ids: the prompt.
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._params = params
        self._tails, self._single = _compile(params.dry_sequence_breakers)
        self._longest = max((len(t) for tails in self._tails.values() for t in tails), default=0)
        self._window = math.inf if params.dry_penalty_last_n < 0 else params.dry_penalty_last_n
        # Nothing before the window can ever matter.
        first = 0 if self._window == math.inf else max(len(prompt_token_ids) - self._window, 0)
        seen = list(prompt_token_ids[first:])
        capacity = max(_FIRST_CAPACITY, 2 * len(seen))
        self._size = len(seen)
        self._tokens, self._match = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
        self._tokens[: self._size] = seen
        self._match[: self._size] = suffix_matches(seen)
        self._break: tuple[int, int] | None = None
        for end in range(self._size):
            self._find_break(end)

    def add(self, token_id: int) -> None:
        """The next token of the request."""
        n = self._size
        if n == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._match = np.concatenate([self._match, np.zeros_like(self._match)])
        tokens, match = self._tokens, self._match
        tokens[n], match[n] = token_id, 0
        first = max(self._start(n), 1)
        if n > 0:
            match[first:n] = np.where(tokens[first:n] == token_id, match[first - 1 : n - 1] + 1, 0)
            match[0] = tokens[0] == token_id
        self._size += 1
        self._find_break(n)

    def copy(self) -> RepeatTracker:
        """One that goes its own way from here."""
        other = copy.copy(self)
        other._tokens, other._match = self._tokens.copy(), self._match.copy()
        return other

    def penalties(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that would make a repetition longer, and what each loses.

        Returns: int64 [E], float32 [E].
        """
        allowed, start = self._params.dry_allowed_length, self._start(self._size)
        limit = self._size - start
        if self._break is not None and self._break[0] >= start:
            limit = min(limit, self._size - 1 - sum(self._break))
        if self._size - start <= allowed or limit < allowed:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        lengths = self._match[start : self._size - 1]
        lengths = np.minimum(np.minimum(lengths, np.arange(1, len(lengths) + 1)), limit)
        where = np.nonzero(lengths >= allowed)[0]
        tokens, lengths = self._tokens[start + 1 :][where], lengths[where]
        ids, inverse = np.unique(tokens, return_inverse=True)
        longest = np.zeros(len(ids), np.int64)
        np.maximum.at(longest, inverse, lengths)
        kept = ~np.isin(ids, self._single)
        return ids[kept], self._amount(longest[kept] - allowed)

    def _amount(self, exponent: np.ndarray) -> np.ndarray:
        base = self._params.dry_base
        if base > 1.000001:  # or it cannot overflow
            exponent = np.minimum(exponent, int(_LOG_FLOAT_MAX / math.log(base)))
        amount = self._params.dry_multiplier * np.power(base, exponent.astype(np.float64))
        return np.minimum(amount, np.finfo(np.float32).max).astype(np.float32)

    def _start(self, size: int) -> int:
        """First position of the window, if the text had ``size`` tokens."""
        return 0 if self._window == math.inf else max(size - self._window, 0)

    def _find_break(self, end: int) -> None:
        """Book the breaker that token ``end`` completes: the latest head, its longest tail."""
        for length in range(min(self._longest, end) + 1):
            head = end - length
            if self._break is not None and head < self._break[0]:
                return
            tail = tuple(self._tokens[head + 1 : end + 1].tolist())
            if tail in self._tails.get(int(self._tokens[head]), ()):
                if self._break is None or (head, length) > self._break:
                    self._break = (head, length)
                return


@lru_cache(maxsize=64)
def _compile(breakers: tuple[tuple[int, ...], ...]) -> tuple[_Tails, np.ndarray]:
    """Head -> tails, and the heads that are breakers by themselves."""
    tails: dict[int, dict[tuple[int, ...], None]] = {}
    for breaker in breakers:
        assert not isinstance(breaker, str), "the front door makes tokens of texts"
        tails.setdefault(breaker[0], {})[tuple(breaker[1:])] = None
    single = np.array(sorted(head for head, found in tails.items() if () in found), np.int64)
    return {head: tuple(found) for head, found in tails.items()}, single


def penalise_repeats(logits: torch.Tensor, rows: Sequence) -> None:
    """Subtract what DRY takes, in place.

    Args:
        logits: float32 [R, V].
        rows: SamplingRow per row, None for rows that are not meant.
    """
    found = [
        (index, *row.repeats.penalties())
        for index, row in enumerate(rows)
        if row is not None and row.repeats is not None
    ]
    found = [entry for entry in found if len(entry[1])]
    if not found:
        return
    index = entry_index(
        [np.full(len(ids), line) for line, ids, _ in found],
        [ids for _, ids, _ in found],
        logits.device,
    )
    amount = torch.from_numpy(np.concatenate([amount for *_, amount in found]))
    logits.index_put_(index, logits[index] - amount.to(logits.device))
