"""One step's sampling: logits of a batch in, one token (or an error) per request out.

Shapes: R rows, V vocabulary, L rows that want log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from oxillama_torch.errors import EngineError, OxiLlamaError, RequestError
from oxillama_torch.sampling.chain import Picked, adjust, pick
from oxillama_torch.sampling.custom import apply_processors
from oxillama_torch.sampling.logprobs import measure, read
from oxillama_torch.sampling.mask import Masks
from oxillama_torch.sampling.mirostat import follow
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.sampling.row import SamplingRow

__all__ = [
    "Sampled",
    "finite_rows",
    "outcomes",
    "pack",
    "reported_logits",
    "sample",
    "unpack",
]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one row came to: a token, or the reason why there is none."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: OxiLlamaError | None = None


def finite_rows(x: torch.Tensor) -> torch.Tensor:
    """Whether each row is free of NaN and infinities.

    Args:
        x: float [R, V].

    Returns: bool [R].
    """
    # Two vectorised passes are much faster than torch.aminmax on a CPU.
    return torch.isfinite(x.amin(-1)) & torch.isfinite(x.amax(-1))


def sample(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    banned: torch.Tensor | None = None,
    masks: Masks | None = None,
) -> list[Sampled]:
    """Choose a token for every row.

    A row with NaN or infinite logits, one whose every token is banned, or one whose processor
    fails gets an error; the others are not touched by it.

    Args:
        logits: float32 [R, V], raw.
        rows: one per row.
        banned: int64 ids that no row may choose; None: none.
        masks: what the grammars of some rows allow; None: no row has one.
    """
    processed, failed = apply_processors(logits, rows)
    allowed, unmasked = (processed, {}) if masks is None else masks.apply(processed)
    failed |= unmasked
    adjusted = adjust(allowed, rows, banned)
    picked = pick(adjusted, rows)
    finite = finite_rows(logits)
    possible = adjusted.amax(-1) > -torch.inf if adjusted is not logits else finite
    reported = reported_logits(logits, allowed, rows)
    # One copy to the host, the only point where it waits for the device.
    flat = pack(outcomes(picked, finite, possible), rows, reported).tolist()
    return unpack(flat, rows, logits.shape[-1], failed)


def outcomes(picked: Picked, finite: torch.Tensor, possible: torch.Tensor) -> torch.Tensor:
    """What came of each row, for ``unpack``: float64 [R, 5], every entry exact.

    Args:
        picked: the tokens.
        finite: bool [R], whether the row's logits are.
        possible: bool [R], whether there was a token to choose.
    """
    columns = (picked.ids, finite, possible, picked.mass, picked.total)
    return torch.stack([column.to(torch.float64) for column in columns], dim=1)


def pack(
    outcomes: torch.Tensor, rows: Sequence[SamplingRow], reported: torch.Tensor | None
) -> torch.Tensor:
    """Everything that the host wants to know of a step, in one tensor.

    Args:
        outcomes: as the function of this name makes them.
        rows: one per row.
        reported: float32 [L, V], logits of the rows that want log-probabilities, in order.

    Returns: float64, flat.
    """
    if reported is None:
        return outcomes.flatten()
    asking, top = _asking(rows, reported.shape[-1])
    chosen = outcomes[_index(asking, outcomes), 0].to(torch.int64)
    return torch.cat([outcomes.flatten(), measure(reported, chosen, top).flatten()])


def unpack(
    flat: Sequence[float],
    rows: Sequence[SamplingRow],
    vocab_size: int,
    failed: Mapping[int, OxiLlamaError],
) -> list[Sampled]:
    """What ``pack`` says, row by row.

    Args:
        flat: its result, on the host.
        rows: one per row.
        vocab_size: V.
        failed: rows that have no token, each with the reason.
    """
    top = _asking(rows, vocab_size)[1]
    measured, width = flat[5 * len(rows) :], 4 + 2 * top
    results = []
    for index, row in enumerate(rows):
        token_id, finite, possible, mass, total = flat[5 * index : 5 * index + 5]
        logprobs = None
        if row.params.logprobs is not None:
            mine, measured = measured[:width], measured[width:]
            if finite and possible and index not in failed:
                logprobs = read(mine, min(row.params.logprobs, top))
        if index in failed:
            results.append(Sampled(None, error=failed[index]))
        elif not finite:
            results.append(Sampled(None, error=EngineError("the model's logits are not finite")))
        elif not possible:
            results.append(
                Sampled(None, error=RequestError("every token of the vocabulary is banned"))
            )
        else:
            if row.params.mirostat:
                follow(row, mass, total)
            results.append(Sampled(int(token_id), logprobs))
    return results


def reported_logits(
    logits: torch.Tensor, allowed: torch.Tensor, rows: Sequence[SamplingRow]
) -> torch.Tensor | None:
    """Logits of the rows that want log-probabilities: their own, or what is left of them.

    Args:
        logits: float32 [R, V], raw.
        allowed: float32 [R, V], after processors and masks.
        rows: one per row.

    Returns: float32 [L, V]; None: no row wants any.
    """
    asking, _ = _asking(rows, logits.shape[-1])
    if not asking:
        return None
    reported = logits[_index(asking, logits)]
    for place, row in enumerate(asking):
        if rows[row].params.logprobs_mode == "masked":
            reported[place] = allowed[row]
    return reported


def _asking(rows: Sequence[SamplingRow], vocab_size: int) -> tuple[list[int], int]:
    """Rows that want log-probabilities, and most alternatives that one of them wants."""
    asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    return asking, min(max((rows[i].params.logprobs for i in asking), default=0), vocab_size)


def _index(lines: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(lines, device=like.device)
