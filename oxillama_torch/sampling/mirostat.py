"""Mirostat: keep the surprise of the output near a target, by truncating more or less.

Surprise is ``-log2 p``. Each request carries mu, at first ``2 * tau``; after a token

    mu = mu - eta * (surprise of the token among those that were kept - tau)

Version 1 estimates Zipf's exponent s from the 100 likeliest tokens and keeps the k likeliest,

    s = sum t_i b_i / sum t_i**2,   t_i = ln((i + 1) / i),   b_i = ln(p_i / p_(i + 1))
    k = (e * 2**mu / (1 - V**-e)) ** (1 / s),   e = s - 1

Version 2 drops tokens whose surprise is above mu. Both keep one token at least.

Source: Basu et al. 2021, arXiv:2007.14966; llama.cpp, ``llama_sampler_init_mirostat``.

Shapes: D rows, V vocabulary, C columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from oxillama_torch.sampling.candidates import Candidates, likeliest
from oxillama_torch.sampling.fixed_point import ONE, steady_sum
from oxillama_torch.sampling.row import MANY, SamplingRow

__all__ = ["follow", "mirostat_1", "mirostat_2"]

_ESTIMATE_FROM = 100


def mirostat_1(c: Candidates) -> list[Candidates] | None:
    """Keep the k likeliest, k by Zipf's law.

    Returns: None when it is done; parts that have to do this step again when rows differ much.
    """
    k = _zipf_k(c)
    # How many columns are needed is for the host to know.
    found = [int(number) for number in k[:, 0].tolist()]
    many = [line for line, number in enumerate(found) if number > MANY]
    if many and len(many) < len(found):
        few = [line for line, number in enumerate(found) if number <= MANY]
        return [c.select(few), c.select(many)]
    columns = likeliest(c.x, max(found))
    c.keep_columns(columns)
    c.drop(torch.arange(columns.shape[-1], device=c.x.device) >= k)
    return None


def mirostat_2(c: Candidates) -> None:
    """Drop what would be more surprising than mu."""
    limit = c.per_row([2.0 ** -min(row.mu, 1000.0) for row in c.rows])
    limit = (limit * c.mass.sum(-1, keepdim=True)).clamp_(max=float(ONE))
    c.drop(c.mass.to(torch.float64) < limit)


def follow(row: SamplingRow, mass: float, total: float) -> None:
    """Book what the chosen token means for ``mu``; it counts once the token is accepted.

    Args:
        row: a row with mirostat.
        mass, total: weight of the token and of all that were kept.
    """
    surprise = math.log2(total / mass)
    row.next_mu = row.mu - row.params.mirostat_eta * (surprise - row.params.mirostat_tau)


def _zipf_k(c: Candidates) -> torch.Tensor:
    """float64 [D, 1], between 1 and V."""
    size = min(_ESTIMATE_FROM, c.x.shape[-1])
    x = c.x.gather(1, likeliest(c.x, size)).to(torch.float64)
    t = torch.from_numpy(np.log(np.arange(2, size + 1) / np.arange(1, size))).to(x.device)
    b = x[:, :-1] - x[:, 1:]
    usable = x[:, 1:] > -torch.inf
    sum_tb = steady_sum((t * b).masked_fill_(~usable, 0))[:, None]
    sum_tt = steady_sum(t * t * usable)[:, None]
    s = sum_tb / sum_tt
    e = s - 1
    mu = c.per_row([row.mu for row in c.rows])
    shrink = 1 - (-e * math.log(c.vocabulary)).exp()
    # (e 2**mu / shrink) ** (1 / s), by way of logarithms: torch.pow's bits depend on the place.
    k = (((e / shrink).log() + mu * math.log(2)) / s).exp().floor()
    return k.nan_to_num(1.0, c.vocabulary, 1.0).clamp_(1, c.vocabulary)
