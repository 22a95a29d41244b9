"""Log-probabilities of a distribution, the raw one as a rule, with rank and top alternatives.

    logprob(t) = l[t] - max l - ln(sum exp(l - max l))

The sum is one of integers and the logarithm is taken on the host in double precision, so a row's
figures depend on that row alone (see fixed_point).

Shapes: R rows, V vocabulary, K most alternatives asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from oxillama_torch.sampling.fixed_point import ONE, ordered_keys, weights
from oxillama_torch.sampling.params import TokenLogprobs

__all__ = ["measure", "read", "token_logprobs"]

#: Elements of [rows, V] worked on at once by ``token_logprobs``: bounds its memory.
_MAX_ELEMENTS = 1 << 23


def measure(logits: torch.Tensor, chosen: torch.Tensor, top: int) -> torch.Tensor:
    """What the host needs for ``read``, as one tensor that is copied back in one go.

    Args:
        logits: float32 [R, V], raw.
        chosen: int64 [R].
        top: K.

    Returns: float64 [R, 4 + 2 K]: chosen id, its logit below the maximum, its rank, the sum of
        weights; then K ids and K logits below the maximum. Every entry is exact in float64 but the
        sum, which is rounded once.
    """
    peak = logits.amax(-1, keepdim=True)
    value = logits.gather(1, chosen[:, None])
    columns = torch.arange(logits.shape[-1], device=logits.device)
    ahead = (logits > value) | ((logits == value) & (columns < chosen[:, None]))
    parts = [
        chosen[:, None],
        value - peak,
        ahead.sum(-1, keepdim=True) + 1,
        weights(logits, peak).sum(-1, keepdim=True),
    ]
    if top:
        ids = ordered_keys(logits).topk(top).indices
        parts += [ids, logits.gather(1, ids) - peak]
    return torch.cat([part.to(torch.float64) for part in parts], dim=1)


def read(measured: Sequence[float], top: int) -> TokenLogprobs:
    """One row of ``measure`` as numbers.

    Args:
        measured: a row, on the host.
        top: alternatives to report, at most those measured.
    """
    log_sum = math.log(measured[3] / ONE)
    known = (len(measured) - 4) // 2
    return TokenLogprobs(
        token_id=int(measured[0]),
        logprob=measured[1] - log_sum,
        rank=int(measured[2]),
        top=tuple(
            (int(measured[4 + i]), measured[4 + known + i] - log_sum)
            for i in range(top)
            if measured[4 + known + i] > -math.inf  # a mask forbids the others
        ),
    )


def token_logprobs(logits: torch.Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens, one per row (prompt scoring).

    Args:
        logits: float32 [R, V].
        token_ids: R ids.
        top: alternatives to report per row.
    """
    top = min(top, logits.shape[-1])
    step = max(1, _MAX_ELEMENTS // logits.shape[-1])
    ids = torch.tensor(token_ids, dtype=torch.int64, device=logits.device)
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), step):
        measured = measure(logits[start : start + step], ids[start : start + step], top)
        found += [read(row, top) for row in measured.tolist()]
    return found
