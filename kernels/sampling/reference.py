"""The sampler in eager torch: one sort, no branch on a value, no wait for the device.

Shapes: R rows, V vocabulary, W words of a mask, H tokens that a row has seen.
"""

from __future__ import annotations

import torch

from oxillama_torch.kernels.registry import register
from oxillama_torch.kernels.sampling.op import Penalties, Settings
from oxillama_torch.sampling.fixed_point import ONE, ordered_keys, weights

__all__ = ["sample", "uniform"]

_GREEDY_BELOW = 1e-5
_LOW = 0xFFFFFFFF


@register("sample", "reference")
def sample(
    logits: torch.Tensor,
    settings: Settings,
    bitmask: torch.Tensor | None,
    penalties: Penalties | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``op.sample``, which checks the arguments."""
    x = _penalised(_masked(logits, bitmask), penalties)
    greedy = settings.temperature < _GREEDY_BELOW
    temperature = settings.temperature.masked_fill(greedy, 1.0)[:, None]
    x = (x - x.amax(-1, keepdim=True)) / temperature
    mass = weights(x, torch.zeros_like(x[:, :1]))
    kept = _kept(x, mass, settings, greedy)
    cumulative = mass.masked_fill(~kept, 0).cumsum(-1)
    total = cumulative[:, -1]
    u = uniform(settings.seeds, settings.positions)
    target = torch.minimum((u * total.to(torch.float64)).to(torch.int64), total - 1)
    token = torch.searchsorted(cumulative, target[:, None], right=True)
    token = token.clamp_(max=logits.shape[-1] - 1)
    peak = logits.amax(-1, keepdim=True)
    below = logits.gather(1, token) - peak
    return token[:, 0], below[:, 0], weights(logits, peak).sum(-1)


def _masked(logits: torch.Tensor, bitmask: torch.Tensor | None) -> torch.Tensor:
    if bitmask is None:
        return logits
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = (bitmask[:, :, None] >> bits & 1).bool().flatten(1)
    return logits.masked_fill(~allowed[:, : logits.shape[-1]], -torch.inf)


def _penalised(x: torch.Tensor, penalties: Penalties | None) -> torch.Tensor:
    if penalties is None:
        return x
    p = penalties
    # What is no token goes to a column of its own, which is cut off again.
    wide = torch.nn.functional.pad(x, (0, 1))
    columns = p.token_ids.where(p.token_ids >= 0, x.shape[-1])
    values = wide.gather(1, columns)
    repetition = p.repetition[:, None]
    values = torch.where(values > 0, values / repetition, values * repetition)
    seen = p.counts.to(torch.float32)
    values = values - p.frequency[:, None] * seen - p.presence[:, None] * (seen > 0)
    return wide.scatter(1, columns, values)[:, :-1]


def _kept(
    x: torch.Tensor, mass: torch.Tensor, settings: Settings, greedy: torch.Tensor
) -> torch.Tensor:
    """bool [R, V]: what top-k, the nucleus of that, and min-p leave."""
    vocabulary = x.shape[-1]
    keys, order = ordered_keys(x).sort(-1, descending=True)
    top_k = settings.top_k.to(torch.int64).masked_fill(greedy, 1)
    top_k = top_k.where(top_k > 0, vocabulary).clamp(max=vocabulary)
    by_k = torch.arange(vocabulary, device=x.device) < top_k[:, None]
    ranked = mass.gather(1, order).masked_fill_(~by_k, 0)
    cumulative = ranked.cumsum(-1)
    wanted = settings.top_p * cumulative[:, -1].to(torch.float64)
    inside = by_k & ((cumulative - ranked).to(torch.float64) < wanted[:, None])
    count = inside.sum(-1, keepdim=True).clamp_(min=1)
    kept = ordered_keys(x) >= keys.gather(1, count - 1)
    return kept & (mass.to(torch.float64) >= (settings.min_p * ONE)[:, None])


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``sampling.philox.uniform`` on the device: Philox4x32-10, 53 bits.

    Args:
        seeds, positions: int64 [R].

    Returns: float64 [R] in [0, 1).
    """
    c0, c1 = positions & _LOW, positions >> 32 & _LOW
    c2 = c3 = torch.zeros_like(positions)
    k0, k1 = seeds & _LOW, seeds >> 32 & _LOW
    for _ in range(10):
        # The low 64 bits of a product are right even where it overflows.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW
        c2, c3 = (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return ((c0 >> 5 << 26) | (c1 >> 6)).to(torch.float64) * 2.0**-53
