"""XTC, "exclude top choices": now and then, leave out all likely tokens but the least likely.

With ``probability``, if at least two tokens have a probability of ``threshold`` or more, all of
them but the least likely one are dropped. No two tokens can reach a threshold above 0.5: off.

Whether it happens is drawn by Philox from (seed, position) in a stream of its own.

Source: p-e-w, text-generation-webui pull request 6335; llama.cpp, ``llama_sampler_init_xtc``.

Shapes: D rows, C columns.
"""

from __future__ import annotations

import torch

from oxillama_torch.sampling.candidates import Candidates
from oxillama_torch.sampling.philox import XTC_STREAM, uniform

__all__ = ["xtc"]


def xtc(c: Candidates) -> None:
    """Drop the top choices of the rows whose turn it is."""
    seeds, positions = [r.params.seed for r in c.rows], [r.position for r in c.rows]
    u = uniform(seeds, positions, XTC_STREAM)
    happens = [bool(n < row.params.xtc_probability) for n, row in zip(u, c.rows)]
    if not any(happens):
        return
    alive = c.x > -torch.inf
    total = c.mass.sum(-1, keepdim=True).to(torch.float64)
    top = alive & (c.mass.to(torch.float64) >= c.column("xtc_threshold") * total)
    top &= c.per_row(happens) > 0
    count = top.sum(-1, keepdim=True)
    # The last column among equals has the highest id, dense or compact.
    lowest = c.x.masked_fill(~top, torch.inf).amin(-1, keepdim=True)
    columns = torch.arange(c.x.shape[-1], device=c.x.device)
    spared = columns.where(top & (c.x == lowest), -1).amax(-1, keepdim=True)
    left = alive.sum(-1, keepdim=True) - (count - 1)
    applies = (count > 1) & (left >= c.column("min_keep"))
    c.drop(top & (columns != spared) & applies, peak=True)
