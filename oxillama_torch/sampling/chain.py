"""From logits to token ids: the order of the steps.

    1. logit bias and bans        add_bias, and the model's own banned tokens
    2. end tokens before min_tokens are banned (same pass)
    3. repetition, frequency, presence penalty         penalise
    4. temperature 0: the likeliest token, ties by lower id, and that is all
    5. temperature
    6. top-k, then top-p          keep_top
    7. min-p                      drop_below_min_p
    8. draw                       draw

Only what some row asks for is computed. Each row's result depends on nothing but that row: steps
are elementwise, compare distinct keys, or add integers (see fixed_point).

Shapes: R rows, V vocabulary, D rows that draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from oxillama_torch.sampling.fixed_point import weights
from oxillama_torch.sampling.philox import uniform
from oxillama_torch.sampling.processors import (
    add_bias,
    changes_logits,
    drop_below_min_p,
    keep_top,
    penalise,
)
from oxillama_torch.sampling.row import SamplingRow

__all__ = ["adjust", "choose", "draw"]


def adjust(
    logits: torch.Tensor, rows: Sequence[SamplingRow], banned: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits after steps 1 to 3; the same tensor when there is nothing to change.

    Args:
        logits: float32 [R, V], left as it is.
        rows: one per row.
        banned: int64 ids that no row may choose.
    """
    if banned is None and not any(changes_logits(row) for row in rows):
        return logits
    logits = logits.clone()
    if banned is not None:
        logits.index_fill_(1, banned, -torch.inf)
    add_bias(logits, rows)
    penalise(logits, rows)
    return logits


def choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """One token per row (steps 4 to 8).

    Args:
        logits: float32 [R, V] as ``adjust`` returns them.
        rows: one per row.

    Returns: int64 [R].
    """
    drawing = [index for index, row in enumerate(rows) if not row.greedy]
    if not drawing:
        return logits.argmax(-1)
    if len(drawing) == len(rows):
        return _sample(logits, rows)
    chosen = logits.argmax(-1)
    index = torch.tensor(drawing, device=logits.device)
    chosen[index] = _sample(logits[index], [rows[i] for i in drawing])
    return chosen


def _sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Steps 5 to 8 for rows [D, V] that all draw."""
    settings = torch.from_numpy(_settings(rows, logits.shape[-1])).to(logits.device)
    temperature, top_k, top_p, min_p, u = settings.unbind(1)
    # Relative to the maximum first: dividing by a tiny temperature must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature[:, None].to(torch.float32)
    mass = weights(scaled, torch.zeros_like(scaled[:, :1]))
    filtered = [index for index, row in enumerate(rows) if row.filtered]
    if filtered:
        index = torch.tensor(filtered, device=logits.device)
        limits = [k for row in rows if (k := row.params.top_k) < logits.shape[-1]]
        mass[index] = keep_top(
            scaled[index],
            mass[index],
            top_k[index].to(torch.int64),
            top_p[index],
            largest_k=max(limits, default=0),
        )
    if any(row.params.min_p for row in rows):
        mass = drop_below_min_p(mass, min_p)
    return draw(mass, u)


def draw(mass: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution: the first token whose cumulative weight exceeds u.

    Args:
        mass: int64 [R, V], weights; at least one above zero per row.
        u: float64 [R] in [0, 1).

    Returns: int64 [R].
    """
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum((u * total.to(torch.float64)).to(torch.int64), total - 1)
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    # Only a row of NaN, which is reported as such, can lie outside.
    return found.clamp_(max=mass.shape[-1] - 1)


def _settings(rows: Sequence[SamplingRow], vocabulary: int) -> np.ndarray:
    """float64 [D, 5]: temperature, top_k (V: all), top_p, min_p and the uniform number."""
    out = np.empty((len(rows), 5), np.float64)
    out[:, :4] = [
        (p.temperature, min(p.top_k or vocabulary, vocabulary), p.top_p, p.min_p)
        for p in (row.params for row in rows)
    ]
    out[:, 4] = uniform([row.params.seed for row in rows], [row.position for row in rows])
    return out
