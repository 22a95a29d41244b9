"""Launcher of the sampler: bitmask, penalties, temperature, top-k, top-p, min-p and the draw.

The steps of ``oxillama_torch.sampling.chain`` that nearly all requests are content with, in its
default order and with its integer weights, so that the tokens are the same. Parameters are tensors
and nothing waits for the device: a call can be part of a CUDA graph.

Shapes: R rows, V vocabulary, W = ceil(V / 32) words of a mask, H tokens that a row has seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxillama_torch.kernels import registry
from oxillama_torch.sampling.fixed_point import MAX_VOCABULARY

__all__ = ["Penalties", "Settings", "sample"]

registry.declare(
    "sample",
    "oxillama_torch.kernels.sampling.reference",
    "oxillama_torch.kernels.sampling.triton_sample",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How each row is sampled.

    Args:
        temperature: float32 [R]; below 1e-5: the likeliest token, ties by lower id.
        top_k: int32 [R]; 0, and V or more, keep all.
        top_p, min_p: float64 [R], between 0 and 1.
        seeds, positions: int64 [R], what the draw depends on.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """What rows lose for tokens they have seen, see ``oxillama_torch.sampling.penalties``.

    Args:
        token_ids: int64 [R, H], each token once; -1: no token.
        counts: int32 [R, H], occurrences that frequency and presence are about.
        repetition, frequency, presence: float32 [R].
    """

    token_ids: torch.Tensor
    counts: torch.Tensor
    repetition: torch.Tensor
    frequency: torch.Tensor
    presence: torch.Tensor


def sample(
    logits: torch.Tensor,
    settings: Settings,
    *,
    bitmask: torch.Tensor | None = None,
    penalties: Penalties | None = None,
    numerics: str = "invariant",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token per row, and what its raw log-probability is made of.

    ``logprob = below - ln(total / 2**43)``, of the distribution before every step.

    Args:
        logits: float32 [R, V], left as they are; V at most 2**19.
        settings: parameters of each row.
        bitmask: int32 [R, W]; a token is allowed if its bit is set. None: all are.
        penalties: None: there are none.
        numerics: ``"invariant"`` or ``"fast"``.

    Returns: int64 [R] tokens, float32 [R] their logits below the highest, int64 [R] weights in all.

    Raises:
        ValueError: an operand does not fit; says got and wanted.

    Source: the papers named in ``oxillama_torch.sampling``; Philox: Salmon et al. 2011.
    """
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        got = f"{logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}"
        raise ValueError(f"logits: got {got}, wanted contiguous float32 (R, V)")
    rows, vocabulary = logits.shape
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"logits: got {vocabulary} columns, wanted 1 to {MAX_VOCABULARY}")
    for name, dtype in _SETTINGS.items():
        _check(name, getattr(settings, name), (rows,), dtype, logits.device)
    if bitmask is not None:
        _check("bitmask", bitmask, (rows, -(-vocabulary // 32)), torch.int32, logits.device)
    if penalties is not None:
        seen = (rows, penalties.token_ids.shape[-1])
        for name, dtype in _PENALTIES.items():
            shape = seen if name in ("token_ids", "counts") else (rows,)
            _check(name, getattr(penalties, name), shape, dtype, logits.device)
    if rows == 0:
        ids = logits.new_empty(0, dtype=torch.int64)
        return ids, logits.new_empty(0), ids
    call = registry.Call(logits.device.type, logits.dtype, numerics, m=rows)
    return registry.select("sample", call).function(logits, settings, bitmask, penalties)


_SETTINGS = {
    "temperature": torch.float32,
    "top_k": torch.int32,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "seeds": torch.int64,
    "positions": torch.int64,
}

_PENALTIES = {
    "token_ids": torch.int64,
    "counts": torch.int32,
    "repetition": torch.float32,
    "frequency": torch.float32,
    "presence": torch.float32,
}


def _check(
    name: str, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if (x.shape, x.dtype, x.device) != (shape, dtype, device) or not x.is_contiguous():
        got = f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        raise ValueError(f"{name}: got {got}, wanted contiguous {dtype} {shape} on {device}")
