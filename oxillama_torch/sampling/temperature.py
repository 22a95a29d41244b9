"""Temperature, fixed or following the entropy.

    l = l / T
    T = low + (high - low) * (H / ln n) ** exponent     with a dynamic range

H is the entropy of the n candidates that are left; low and high are ``temperature`` minus and plus
``dynatemp_range``, low not below 0.

Source: llama.cpp, ``llama_sampler_init_temp_ext`` (kalomaze's dynamic temperature).

Shapes: D rows, C columns.
"""

from __future__ import annotations

import torch

from oxillama_torch.sampling.candidates import Candidates
from oxillama_torch.sampling.ranking import entropy
from oxillama_torch.sampling.row import GREEDY_BELOW

__all__ = ["temperature"]


def temperature(c: Candidates) -> None:
    """Divide the logits."""
    t = c.column("temperature")
    if any(row.params.dynatemp_range for row in c.rows):
        t = _dynamic(c, t)
    c.scale(t.to(torch.float32))


def _dynamic(c: Candidates, t: torch.Tensor) -> torch.Tensor:
    spread, exponent = c.column("dynatemp_range"), c.column("dynatemp_exponent")
    count = (c.x > -torch.inf).sum(-1, keepdim=True).to(torch.float64)
    share = (entropy(c) / count.log()).clamp_(0, 1)
    # exp(e ln s) instead of s ** e: torch.pow's bits depend on the place in memory.
    power = torch.where(share > 0, (exponent * share.log()).exp(), (exponent == 0).to(share.dtype))
    low = (t - spread).clamp_(min=0)
    dynamic = low + (t + spread - low) * power
    return torch.where((spread > 0) & (count > 1), dynamic, t).clamp_(min=GREEDY_BELOW)
