"""The steps that change logits or drop candidates, each over the rows that ask for it.

Shapes: R rows, V vocabulary, E single entries (row, token) to change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from oxillama_torch.sampling.fixed_point import ONE, ordered_keys
from oxillama_torch.sampling.row import SamplingRow

__all__ = ["add_bias", "changes_logits", "drop_below_min_p", "keep_top", "penalise"]

_FIRST_CANDIDATES = 256
_GROWTH = 16


def changes_logits(row: SamplingRow) -> bool:
    """Whether ``add_bias`` or ``penalise`` would touch this row."""
    return bool(
        len(row.bias_ids) or row.history is not None or (len(row.end_ids) and row.must_go_on)
    )


def add_bias(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """``l[t] += bias[t]``, and minus infinity for end tokens before ``min_tokens``; in place.

    Args:
        logits: float32 [R, V].
        rows: one per row.
    """
    where, ids, values = [], [], []
    for index, row in enumerate(rows):
        if len(row.bias_ids):
            where.append(np.full(len(row.bias_ids), index))
            ids.append(row.bias_ids)
            values.append(row.bias)
        if len(row.end_ids) and row.must_go_on:
            where.append(np.full(len(row.end_ids), index))
            ids.append(row.end_ids)
            values.append(np.full(len(row.end_ids), -np.inf, np.float32))
    if ids:
        index = _entries(where, ids, logits.device)
        bias = torch.from_numpy(np.concatenate(values)).to(logits.device)
        # A token may be listed by both; adding to minus infinity is exact in any order.
        logits.index_put_(index, bias, accumulate=True)


def penalise(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition, frequency and presence penalties, in place.

    ``l = l / r if l > 0 else l * r`` for tokens of prompt and output (Keskar et al. 2019,
    arXiv:1909.05858), then ``l -= frequency * count + presence * (count > 0)`` for tokens of the
    output (OpenAI API reference).

    Args:
        logits: float32 [R, V].
        rows: one per row.
    """
    with_history = [
        (index, row) for index, row in enumerate(rows) if row.history and len(row.history.ids)
    ]
    if not with_history:
        return
    sizes = [len(row.history.ids) for _, row in with_history]
    index = _entries(
        [np.repeat([i for i, _ in with_history], sizes)],
        [row.history.ids for _, row in with_history],
        logits.device,
    )
    counts = np.concatenate([row.history.counts for _, row in with_history])
    settings = np.array(
        [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty)
            for p in (row.params for _, row in with_history)
        ],
        np.float32,
    )
    columns = np.column_stack([np.repeat(settings, sizes, axis=0), counts]).astype(np.float32)
    repetition, frequency, presence, count = torch.from_numpy(columns).to(logits.device).unbind(1)
    values = logits[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * count - presence * (count > 0)
    logits.index_put_(index, values)


def keep_top(
    x: torch.Tensor,
    mass: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    largest_k: int,
) -> torch.Tensor:
    """Weights with everything outside top-k, then outside the nucleus, set to zero.

    The nucleus is the smallest set of likeliest tokens whose share of what top-k left is at least
    ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751); it holds at least one token. Equal logits
    count in order of their ids.

    A nucleus without top-k may hold any number of tokens. Sorting them all is slow, so the
    likeliest few are looked at first, and more only if some row needs them.

    Args:
        x: float32 [R, V], what decides the order.
        mass: int64 [R, V], weights of ``x``.
        top_k: int64 [R], between 1 and V; V keeps all.
        top_p: float64 [R].
        largest_k: the largest of ``top_k`` below V, 0 if there is none.

    Returns: int64 [R, V].
    """
    keys = ordered_keys(x)
    vocabulary = x.shape[-1]
    total = mass.sum(-1)
    size = min(max(_FIRST_CANDIDATES, largest_k), vocabulary)
    while True:
        values, columns = keys.topk(size)
        kept_by_k = torch.arange(size, device=x.device) < top_k[:, None]
        ranked = mass.gather(1, columns).masked_fill_(~kept_by_k, 0)
        cumulative = ranked.cumsum(-1)
        share = torch.where(top_k < vocabulary, cumulative[:, -1], total)
        wanted = top_p * share.to(torch.float64)
        if size == vocabulary or bool((cumulative[:, -1] >= wanted).all()):
            break
        size = min(size * _GROWTH, vocabulary)
    inside = kept_by_k & ((cumulative - ranked).to(torch.float64) < wanted[:, None])
    count = inside.sum(-1, keepdim=True).clamp_(min=1)
    return mass.masked_fill(keys < values.gather(1, count - 1), 0)


def drop_below_min_p(mass: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Weights with every token below ``min_p`` times the likeliest one's probability set to zero.

    Args:
        mass: int64 [R, V].
        min_p: float64 [R].

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    return mass.masked_fill(mass.to(torch.float64) < (min_p * ONE)[:, None], 0)


def _entries(
    where: Sequence[np.ndarray], ids: Sequence[np.ndarray], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, token) index of single entries, moved to the device in one copy."""
    both = np.stack([np.concatenate(where), np.concatenate(ids)]).astype(np.int64)
    rows, columns = torch.from_numpy(both).to(device).unbind(0)
    return rows, columns
