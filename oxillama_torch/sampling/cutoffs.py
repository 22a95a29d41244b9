"""Steps that drop what is below a threshold of its own row.

    min-p      p < min_p * max p                   Nguyen et al. 2024, arXiv:2407.01082
    top-a      p < a * (max p)**2                  BlinkDL, RWKV-LM, "top-a sampling"
    epsilon    p < epsilon                         Hewitt et al. 2022, arXiv:2210.15191
    eta        p < min(eta, sqrt(eta) * exp(-H))   the same; H: entropy in nats
    top-n-sigma  l < max l - n * std(l)            Tang et al. 2024, arXiv:2411.07641

Probabilities are of what the steps before have left; so are entropy and standard deviation. The
likeliest token always stays.

Shapes: D rows, C columns.
"""

from __future__ import annotations

import torch

from oxillama_torch.sampling.candidates import Candidates
from oxillama_torch.sampling.fixed_point import ONE, steady_sum
from oxillama_torch.sampling.ranking import entropy

__all__ = ["epsilon_cutoff", "eta_cutoff", "min_p", "top_a", "top_n_sigma"]


def min_p(c: Candidates) -> None:
    """Drop what is unlikely beside the likeliest token."""
    _drop_below(c, c.column("min_p") * ONE)


def top_a(c: Candidates) -> None:
    """Drop what is below the square of the highest probability, times ``top_a``."""
    _drop_below(c, c.column("top_a") * float(ONE) * ONE / c.mass.sum(-1, keepdim=True))


def epsilon_cutoff(c: Candidates) -> None:
    """Drop what is below a fixed probability."""
    _drop_below(c, c.column("epsilon_cutoff") * c.mass.sum(-1, keepdim=True))


def eta_cutoff(c: Candidates) -> None:
    """Drop what is below a probability that falls as the entropy rises."""
    eta = c.column("eta_cutoff")
    limit = torch.minimum(eta, eta.sqrt() * (-entropy(c)).exp())
    _drop_below(c, limit * c.mass.sum(-1, keepdim=True))


def top_n_sigma(c: Candidates) -> None:
    """Drop logits far below the highest, measured by their standard deviation."""
    alive = c.x > -torch.inf
    count = alive.sum(-1, keepdim=True).to(torch.float64)
    below = (c.x - c.peak).to(torch.float64).masked_fill_(~alive, 0)
    mean = steady_sum(below)[:, None] / count
    spread = (below - mean).masked_fill_(~alive, 0)
    deviation = (steady_sum(spread.square_())[:, None] / count).sqrt_()
    c.drop(below < -c.column("top_n_sigma") * deviation)


def _drop_below(c: Candidates, limit: torch.Tensor) -> None:
    """Drop weights below ``limit``, float64 [D, 1], but neither the highest nor ``min_keep``."""
    gone = c.mass.to(torch.float64) < limit.clamp(max=float(ONE))
    kept = c.first("min_keep")
    c.drop(gone if kept is None else gone & ~kept)
