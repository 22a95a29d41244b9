"""Step 1 of the chain: what must not be chosen, and what is made likelier or unlikelier.

    l[t] += bias[t]
    l[t] = -inf   for end tokens before ``min_tokens``, for what would complete a bad word, and for
                  all but the allowed tokens

Shapes: R rows, V vocabulary, A rows that allow some tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from oxillama_torch.sampling.entries import entry_index

__all__ = ["BadWords", "add_bias", "keep_allowed"]


class BadWords:
    """Token sequences that are not to be completed.

    Args:
        words: one sequence or more; texts have been made tokens by the front door.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        assert not any(isinstance(word, str) for word in words), "the front door makes them tokens"
        self._always = [word[0] for word in words if len(word) == 1]
        self._by_last: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._by_last.setdefault(word[-2], []).append(tuple(word))

    def banned(self, token_ids: Sequence[int]) -> list[int]:
        """Tokens that would complete a word after ``token_ids``."""
        if not token_ids:
            return self._always
        return self._always + [
            word[-1]
            for word in self._by_last.get(token_ids[-1], ())
            if tuple(token_ids[1 - len(word) :]) == word[:-1]
        ]


def add_bias(logits: torch.Tensor, rows: Sequence) -> None:
    """Logit bias, end tokens before ``min_tokens`` and bad words; in place.

    Args:
        logits: float32 [R, V].
        rows: SamplingRow per row.
    """
    where, ids, values = [], [], []
    for index, row in enumerate(rows):
        banned = row.banned_now()
        if len(row.bias_ids):
            where.append(np.full(len(row.bias_ids), index))
            ids.append(row.bias_ids)
            values.append(row.bias)
        if len(banned):
            where.append(np.full(len(banned), index))
            ids.append(banned)
            values.append(np.full(len(banned), -np.inf, np.float32))
    if ids:
        entries = entry_index(where, ids, logits.device)
        bias = torch.from_numpy(np.concatenate(values)).to(logits.device)
        # A token may be listed twice; adding to minus infinity is exact in any order.
        logits.index_put_(entries, bias, accumulate=True)


def keep_allowed(logits: torch.Tensor, rows: Sequence) -> None:
    """Minus infinity for all but the allowed tokens, in place.

    Args:
        logits: float32 [R, V].
        rows: SamplingRow per row.
    """
    lines = [index for index, row in enumerate(rows) if row.allowed_ids is not None]
    if not lines:
        return
    allowed = [rows[line].allowed_ids for line in lines]
    gone = torch.ones(len(lines), logits.shape[-1], dtype=torch.bool, device=logits.device)
    where = [np.full(len(ids), place) for place, ids in enumerate(allowed)]
    gone[entry_index(where, allowed, logits.device)] = False
    index = torch.tensor(lines, device=logits.device)
    logits[index] = logits[index].masked_fill_(gone, -torch.inf)
