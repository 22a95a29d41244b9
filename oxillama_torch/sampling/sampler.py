"""One step's sampling: logits of a batch in, one token (or an error) per request out.

Shapes: R rows, V vocabulary, L rows that want log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oxillama_torch.errors import EngineError, OxiLlamaError, RequestError
from oxillama_torch.sampling.chain import adjust, pick
from oxillama_torch.sampling.custom import apply_processors
from oxillama_torch.sampling.logprobs import measure, read
from oxillama_torch.sampling.mask import Masks
from oxillama_torch.sampling.mirostat import follow
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.sampling.row import SamplingRow

__all__ = ["Sampled", "finite_rows", "sample"]


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
    chosen = picked.ids
    finite = finite_rows(logits)
    possible = adjusted.amax(-1) > -torch.inf if adjusted is not logits else finite
    columns = [chosen, finite, possible, picked.mass, picked.total]
    columns = [torch.stack([column.to(torch.float64) for column in columns], dim=1)]
    asking = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    top = min(max((rows[i].params.logprobs for i in asking), default=0), logits.shape[-1])
    if asking:
        index = torch.tensor(asking, device=logits.device)
        columns.append(measure(_reported(logits, allowed, rows, asking), chosen[index], top))
    # One copy to the host, the only point where it waits for the device.
    flat = torch.cat([part.flatten() for part in columns]).tolist()
    measured, width = flat[5 * len(rows) :], 4 + 2 * top
    results = []
    for index, row in enumerate(rows):
        token_id, is_finite, is_possible, mass, total = flat[5 * index : 5 * index + 5]
        logprobs = None
        if row.params.logprobs is not None:
            mine, measured = measured[:width], measured[width:]
            if is_finite and is_possible and index not in failed:
                logprobs = read(mine, min(row.params.logprobs, top))
        if index in failed:
            results.append(Sampled(None, error=failed[index]))
        elif not is_finite:
            results.append(Sampled(None, error=EngineError("the model's logits are not finite")))
        elif not is_possible:
            results.append(
                Sampled(None, error=RequestError("every token of the vocabulary is banned"))
            )
        else:
            if row.params.mirostat:
                follow(row, mass, total)
            results.append(Sampled(int(token_id), logprobs))
    return results


def _reported(
    logits: torch.Tensor, allowed: torch.Tensor, rows: Sequence[SamplingRow], asking: Sequence[int]
) -> torch.Tensor:
    """float32 [L, V]: for each row that asks, its own logits or what is left of them."""
    reported = logits[torch.tensor(asking, device=logits.device)]
    for place, row in enumerate(asking):
        if rows[row].params.logprobs_mode == "masked":
            reported[place] = allowed[row]
    return reported
