"""Random numbers that are a pure function of (seed, position, stream): Philox4x32-10.

A request's draw must not depend on its neighbours, on batch order, on chunking or on what was drawn
before a preemption. A counter-based generator has no state to get out of step.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from oxillama_torch.sampling.params import MAX_SEED

__all__ = [
    "TOKEN_STREAM",
    "XTC_STREAM",
    "child_seed",
    "philox4x32",
    "random_seed",
    "uniform",
]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MASK64 = (1 << 64) - 1

# The third word of the counter keeps numbers for different ends apart.
TOKEN_STREAM, _CHILD_STREAM, XTC_STREAM = 0, 1, 2


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Args:
        counter: uint32 [N, 4].
        key: uint32 [N, 2].

    Returns: uint32 [N, 4].
    """
    c0, c1, c2, c3 = counter.astype(np.uint64).T
    k0, k1 = key.astype(np.uint64).T
    for round_number in range(_ROUNDS):
        bump0 = np.uint64(round_number * _WEYL[0] & 0xFFFFFFFF)
        bump1 = np.uint64(round_number * _WEYL[1] & 0xFFFFFFFF)
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ ((k0 + bump0) & _LOW),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ ((k1 + bump1) & _LOW),
            product0 & _LOW,
        )
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniform(
    seeds: Sequence[int], positions: Sequence[int], stream: int = TOKEN_STREAM
) -> np.ndarray:
    """One number in [0, 1) per (seed, position, stream): 53 random bits.

    Returns: float64 [N].
    """
    counter = _split(positions, 4)
    counter[:, 2] = stream
    words = philox4x32(counter, _split(seeds, 2)).astype(np.uint64)
    high, low = words[:, 0] >> np.uint64(5), words[:, 1] >> np.uint64(6)
    return ((high << np.uint64(26)) | low).astype(np.float64) * 2.0**-53


def child_seed(seed: int, index: int) -> int:
    """Seed of completion ``index`` of one request: ``seed`` itself for 0, unrelated ones above.

    Adding the index would make completion 1 of seed 7 the same as completion 0 of seed 8.
    """
    if index == 0:
        return seed
    counter = np.array([[index & 0xFFFFFFFF, index >> 32, _CHILD_STREAM, 0]], np.uint32)
    words = philox4x32(counter, _split([seed], 2))[0]
    return (int(words[0]) << 32 | int(words[1])) & MAX_SEED


def random_seed() -> int:
    """A seed nobody can guess, for a request that did not choose one."""
    return secrets.randbits(63)


def _split(values: Sequence[int], words: int) -> np.ndarray:
    """64-bit integers (negative ones as two's complement) as little-endian uint32 [N, words]."""
    wide = np.array([value & _MASK64 for value in values], np.uint64)
    out = np.zeros((len(wide), words), np.uint32)
    out[:, 0], out[:, 1] = wide & _LOW, wide >> _SHIFT
    return out
