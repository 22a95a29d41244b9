"""From logits to token ids: the order of the steps.

    0. processors                         custom, in ``sampler``: the request's own functions
    1. grammar, bias and bans             mask, bans
    2. penalties, then DRY                penalties, dry
    3. temperature 0: the likeliest token, ties by lower id, and that is all
    4. the other steps of ``samplers`` in the request's order; by default top_n_sigma, temperature,
       top_k, typical_p, top_a, epsilon_cutoff, eta_cutoff, top_p, min_p, xtc
    5. draw                               draw

With mirostat, it takes the place of all steps of 4 but the temperature. Only what some row asks for
is computed, over the rows that take the same steps together. Each row's result depends on nothing
but that row: steps are elementwise, compare distinct keys, add integers or add in a fixed order
(see fixed_point).

Shapes: R rows, V vocabulary, D rows that draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from oxillama_torch.sampling.bans import add_bias, keep_allowed
from oxillama_torch.sampling.candidates import Candidates
from oxillama_torch.sampling.cutoffs import epsilon_cutoff, eta_cutoff, min_p, top_a, top_n_sigma
from oxillama_torch.sampling.dry import penalise_repeats
from oxillama_torch.sampling.mirostat import mirostat_1, mirostat_2
from oxillama_torch.sampling.penalties import penalise
from oxillama_torch.sampling.philox import uniform
from oxillama_torch.sampling.ranking import top_k, top_p, typical_p
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.temperature import temperature
from oxillama_torch.sampling.xtc import xtc

__all__ = ["Picked", "adjust", "choose", "draw", "pick", "probabilities"]

_LOGIT_STEPS = {"penalties": penalise, "dry": penalise_repeats}

#: Logits of one part on a CPU, measured: more spill out of the caches, fewer pay for each call.
_CACHED_ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class Picked:
    """One token per row.

    Args:
        ids: int64 [R].
        mass, total: float64 [R], weight of the token and of all that could have been drawn; both 1
            where nothing was drawn.
    """

    ids: torch.Tensor
    mass: torch.Tensor
    total: torch.Tensor


def adjust(
    logits: torch.Tensor, rows: Sequence[SamplingRow], banned: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits after bias, bans, penalties and DRY; the same tensor when nothing is to be changed.

    Args:
        logits: float32 [R, V], left as it is.
        rows: one per row.
        banned: int64 ids that no row may choose.
    """
    if banned is None and not any(row.changes_logits for row in rows):
        return logits
    logits = logits.clone()
    if banned is not None:
        logits.index_fill_(1, banned, -torch.inf)
    add_bias(logits, rows)
    keep_allowed(logits, rows)
    for turn in range(max((len(row.logit_steps) for row in rows), default=0)):
        for name, step in _LOGIT_STEPS.items():
            meant = [row.logit_steps[turn : turn + 1] == (name,) for row in rows]
            step(logits, [row if is_meant else None for row, is_meant in zip(rows, meant)])
    return logits


def choose(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """One token per row.

    Args:
        logits: float32 [R, V] as ``adjust`` returns them.
        rows: one per row.

    Returns: int64 [R].
    """
    return pick(logits, rows).ids


def pick(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Picked:
    """As ``choose``, with what mirostat needs to know."""
    ones = torch.ones(len(rows), dtype=torch.float64, device=logits.device)
    greedy = sum(row.greedy for row in rows)
    ids = logits.argmax(-1) if greedy else torch.empty_like(ones, dtype=torch.int64)
    if greedy == len(rows):
        return Picked(ids, ones, ones)
    picked = Picked(ids, ones, ones.clone())
    for part in _candidates(logits, rows):
        _draw_part(part, picked)
    return picked


def probabilities(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """What rows draw from, after all steps.

    Args:
        logits: float32 [R, V] as ``adjust`` returns them.
        rows: one per row.

    Returns: float64 [R, V]; 1 at the likeliest token of a greedy row.
    """
    out = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    for line, row in enumerate(rows):
        if row.greedy:
            out[line, logits[line].argmax()] = 1
    for part in _candidates(logits, rows):
        mass, ids = part.by_id()
        share = mass.to(torch.float64) / mass.sum(-1, keepdim=True)
        index = torch.tensor(part.places, device=logits.device)
        dense = out.new_zeros(len(share), part.vocabulary)
        out[index] = share if ids is None else dense.scatter_(1, ids, share)
    return out


def _candidates(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Iterator[Candidates]:
    """What is left after all steps, for the rows that draw; those with the same steps together."""
    groups: dict[tuple[tuple[str, ...], bool], list[int]] = {}
    for line, row in enumerate(rows):
        if not row.greedy:
            groups.setdefault((row.steps, row.ranks_many), []).append(line)
    for (steps, _), lines in groups.items():
        relative = bool(steps) and not any(step in _LOGIT_STEPS for step in steps)
        for part in _at_once(lines, logits):
            x = logits[part[0] : part[-1] + 1]
            if len(x) > len(part):
                x = logits[torch.tensor(part, device=logits.device)]
            candidates = Candidates(x, [rows[i] for i in part], part, relative=relative)
            yield from _narrow(candidates, steps)


def _at_once(lines: list[int], logits: torch.Tensor) -> Iterator[list[int]]:
    """Lines in parts whose logits stay in the caches of a CPU; a GPU takes them all."""
    size = len(lines)
    if logits.device.type == "cpu":
        size = max(1, _CACHED_ELEMENTS // logits.shape[-1])
    return (lines[start : start + size] for start in range(0, len(lines), size))


def _narrow(c: Candidates, steps: Sequence[str]) -> Iterator[Candidates]:
    """Take the steps; rows that turn out to need more work than others leave in parts."""
    for number, name in enumerate(steps):
        c.last = number + 1 == len(steps)
        parts = _STEPS[name](c)
        if parts is not None:
            for part in parts:
                yield from _narrow(part, steps[number:])
            return
    yield c


def _draw_part(c: Candidates, picked: Picked) -> None:
    mass, ids = c.by_id()
    u = uniform([row.params.seed for row in c.rows], [row.position for row in c.rows])
    column = draw(mass, torch.from_numpy(u).to(mass.device))
    index = torch.tensor(c.places, device=mass.device)
    picked.ids[index] = column if ids is None else ids.gather(1, column[:, None])[:, 0]
    if any(row.params.mirostat for row in c.rows):
        picked.mass[index] = mass.gather(1, column[:, None])[:, 0].to(torch.float64)
        picked.total[index] = mass.sum(-1).to(torch.float64)


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


def _late(step: Callable) -> Callable[[Candidates], None]:
    """A change of single logits as a step among those that drop candidates."""

    def take(c: Candidates) -> None:
        c.dense()
        x = c.x.clone()
        step(x, c.rows)
        c.replace(x)

    return take


_STEPS: Mapping[str, Callable[[Candidates], list[Candidates] | None]] = {
    "penalties": _late(penalise),
    "dry": _late(penalise_repeats),
    "top_n_sigma": top_n_sigma,
    "temperature": temperature,
    "top_k": top_k,
    "typical_p": typical_p,
    "top_a": top_a,
    "epsilon_cutoff": epsilon_cutoff,
    "eta_cutoff": eta_cutoff,
    "top_p": top_p,
    "min_p": min_p,
    "xtc": xtc,
    "mirostat_1": mirostat_1,
    "mirostat_2": mirostat_2,
}
