"""Steps that keep the first of an order: top-k, top-p, typical-p.

top-k keeps the k likeliest (Fan et al. 2018, arXiv:1805.04833).

top-p keeps the smallest set of likeliest tokens whose share is at least p (Holtzman et al. 2020,
arXiv:1904.09751).

typical-p does the same in order of ``|-ln p(t) - H|``, H the entropy: the tokens whose surprise is
nearest to what is to be expected (Meister et al. 2023, arXiv:2202.00666).

All count equal values in order of token ids, and keep at least one token; shares are of what the
steps before have left.

Shapes: D rows, V vocabulary, C columns.
"""

from __future__ import annotations

import torch

from oxillama_torch.sampling.candidates import Candidates, likeliest
from oxillama_torch.sampling.fixed_point import ONE, steady_sum

__all__ = ["entropy", "top_k", "top_p", "typical_p"]

_FIRST_CANDIDATES = 256
_GROWTH = 16

#: Below any logit, relative to the highest, that still has a weight.
_LOWEST = -64.0


def top_k(c: Candidates) -> None:
    """Keep the ``top_k`` likeliest."""
    c.keep_columns(likeliest(c.x, c.largest("top_k")))
    if any(row.params.top_k < c.x.shape[-1] for row in c.rows):
        c.drop(torch.arange(c.x.shape[-1], device=c.x.device) >= c.column("top_k"))


def top_p(c: Candidates) -> list[Candidates] | None:
    """Keep the nucleus."""
    return _keep_share(c, c.x, c.column("top_p"))


def typical_p(c: Candidates) -> list[Candidates] | None:
    """Keep the typical tokens."""
    # The logarithm of the total is part of both surprise and entropy.
    below = (c.x - c.peak).to(torch.float64)
    score = (below - _mean(c, below)).abs_().neg_().to(torch.float32)
    score.masked_fill_(c.mass == 0, -torch.inf)
    return _keep_share(c, score, c.column("typical_p"), by_score=True)


def entropy(c: Candidates) -> torch.Tensor:
    """``-sum p ln p`` in nats, float64 [D, 1]."""
    total = c.mass.sum(-1, keepdim=True).to(torch.float64)
    return (total / ONE).log() - _mean(c, (c.x - c.peak).to(torch.float64))


def _mean(c: Candidates, below: torch.Tensor) -> torch.Tensor:
    """Mean over the distribution of ``below``, float64 [D, C], as float64 [D, 1]."""
    mass = c.mass.to(torch.float64)
    weighted = below.clamp(min=_LOWEST).mul_(mass)
    return steady_sum(weighted)[:, None] / c.mass.sum(-1, keepdim=True)


def _keep_share(
    c: Candidates, score: torch.Tensor, share: torch.Tensor, *, by_score: bool = False
) -> list[Candidates] | None:
    """Keep the best by ``score`` until their weight reaches ``share`` of the total.

    Any number of tokens may be needed. Ranking them all is slow, so the best few are looked at
    first; rows that need more go on by themselves.

    Returns: None when it is done; parts that have to do this step again when rows differ.
    """
    columns, size = None, min(_first_size(c), c.x.shape[-1])
    wanted = share * c.mass.sum(-1, keepdim=True).to(torch.float64)
    while columns is None:
        columns = likeliest(score, size)
        mass = c.mass.gather(1, columns)
        cumulative = mass.cumsum(-1)
        enough = (cumulative[:, -1:] >= wanted)[:, 0].tolist()
        if size < c.x.shape[-1] and not all(enough):
            if any(enough):
                lines = range(len(enough))
                done = [i for i in lines if enough[i]]
                return [c.select(done), c.select([i for i in lines if not enough[i]])]
            columns, size = None, min(size * _GROWTH, c.x.shape[-1])
    before = cumulative - mass
    inside = (before.to(torch.float64) < wanted) | (before == 0)
    rank = torch.arange(size, device=c.x.device)
    inside |= rank < c.column("min_keep")
    c.keep_columns(columns)
    c.drop(~inside, peak=by_score)
    if by_score:
        c.sort()
    return None


def _first_size(c: Candidates) -> int:
    """How many to look at first: all, once they are few."""
    if c.ids is not None:
        return c.x.shape[-1]
    return max(_FIRST_CANDIDATES, c.largest("min_keep"))
