"""Sampling with the ``sample`` op, for rows that are content with the steps it takes.

Those are the grammar's mask, the three penalties, temperature, top-k, top-p, min-p and the draw, in
this order; nearly every request wants no other. The op takes them with the chain's integer weights,
so a token is the same whichever of the two chose it. Rows with anything else go to the chain.

Shapes: R rows, V vocabulary, H most tokens that a row has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.sampling.op import Penalties, Settings
from oxillama_torch.kernels.sampling.op import sample as sample_op
from oxillama_torch.sampling.chain import Picked
from oxillama_torch.sampling.mask import Masks
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.sampler import (
    Sampled,
    finite_rows,
    outcomes,
    pack,
    reported_logits,
    unpack,
)

__all__ = ["RowSettings", "is_served", "sample_on_device", "wanted_on"]

_ORDER = ("temperature", "top_k", "top_p", "min_p")


def wanted_on(device: torch.device) -> bool:
    """Whether the op is to be preferred to the chain.

    On a CPU the chain is faster, as it looks at the likeliest tokens alone; there the op serves
    when a kernel rule names it.
    """
    return device.type == "cuda" or any(rule.op == "sample" for rule in registry.active_rules())


def is_served(row: SamplingRow) -> bool:
    """Whether the op takes all steps that a row wants for its next token."""
    params = row.params
    plain = not (
        row.processors
        or len(row.bias_ids)
        or row.bad_words is not None
        or row.allowed_ids is not None
        or (len(row.end_ids) and row.must_go_on)
    )
    if not plain or row.logit_steps not in ((), ("penalties",)):
        return False
    if row.greedy:
        return True
    wanted = tuple(step for step in _ORDER if step in row.steps)
    return row.steps == wanted and params.dynatemp_range == 0 and params.min_keep <= 1


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What the op is told of one row; a step that the row does not take is neutral."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition: float
    frequency: float
    presence: float

    @classmethod
    def of(cls, row: SamplingRow, vocab_size: int) -> RowSettings:
        params, steps = row.params, row.steps
        penalised = "penalties" in row.logit_steps
        temperature = params.temperature if "temperature" in steps else 1.0
        return cls(
            temperature=0.0 if row.greedy else temperature,
            top_k=min(params.top_k, vocab_size) if "top_k" in steps else 0,
            top_p=params.top_p if "top_p" in steps else 1.0,
            min_p=params.min_p if "min_p" in steps else 0.0,
            seed=params.seed or 0,
            repetition=params.repetition_penalty if penalised else 1.0,
            frequency=params.frequency_penalty if penalised else 0.0,
            presence=params.presence_penalty if penalised else 0.0,
        )


def sample_on_device(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    banned: torch.Tensor | None = None,
    masks: Masks | None = None,
    numerics: str = "invariant",
) -> list[Sampled]:
    """As ``sampling.sampler.sample``, for rows that ``is_served`` says yes to.

    Args:
        logits: float32 [R, V], raw.
        rows: one per row.
        banned: int64 ids that no row may choose; None: none.
        masks: what the grammars of some rows allow; None: no row has one.
        numerics: see the op.
    """
    allowed, failed = (logits, {}) if masks is None else masks.apply(logits)
    possible = allowed if banned is None else allowed.index_fill(1, banned, -torch.inf)
    settings, penalties = _settings(rows, logits)
    ids, _, _ = sample_op(possible, settings, penalties=penalties, numerics=numerics)
    has_choice = possible.gather(1, ids[:, None])[:, 0] > -torch.inf
    ones = torch.ones_like(ids)
    found = outcomes(Picked(ids, ones, ones), finite_rows(logits), has_choice)
    flat = pack(found, rows, reported_logits(logits, allowed, rows)).tolist()
    return unpack(flat, rows, logits.shape[-1], failed)


def _settings(
    rows: Sequence[SamplingRow], logits: torch.Tensor
) -> tuple[Settings, Penalties | None]:
    """The operands of a step whose rows are not kept on the device."""
    device, of_rows = logits.device, [RowSettings.of(row, logits.shape[-1]) for row in rows]

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(of_row, name) for of_row in of_rows], dtype=dtype).to(device)

    settings = Settings(
        temperature=column("temperature", torch.float32),
        top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float64),
        min_p=column("min_p", torch.float64),
        seeds=column("seed", torch.int64),
        positions=torch.tensor([row.position for row in rows]).to(device),
    )
    seen = [row.history.penalised() if row.logit_steps else ((), ()) for row in rows]
    most = max(len(ids) for ids, _ in seen)
    if not most:
        return settings, None
    token_ids, counts = np.full((len(rows), most), -1), np.zeros((len(rows), most), np.int32)
    for line, (ids, times) in enumerate(seen):
        token_ids[line, : len(ids)], counts[line, : len(ids)] = ids, times
    penalties = Penalties(
        torch.from_numpy(token_ids).to(device),
        torch.from_numpy(counts).to(device),
        *(column(name, torch.float32) for name in ("repetition", "frequency", "presence")),
    )
    return settings, penalties
