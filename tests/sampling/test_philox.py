"""Philox4x32-10 against the known answers of Random123 (kat_vectors), and what is built on it."""

from __future__ import annotations

import numpy as np
import pytest

from oxillama_torch.sampling.params import MAX_SEED
from oxillama_torch.sampling.philox import child_seed, philox4x32, random_seed, uniform

# "philox4x32 10" lines of Random123's tests/kat_vectors: counter, key, expected.
KNOWN_ANSWERS = [
    pytest.param(
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        id="zeros",
    ),
    pytest.param(
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
        id="ones",
    ),
    pytest.param(
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
        id="pi",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16) for word in text.split()]], np.uint32)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert np.array_equal(philox4x32(words(counter), words(key)), words(expected))


def test_rows_do_not_know_each_other():
    alone = [uniform([seed], [9]) for seed in range(5)]
    assert np.array_equal(uniform(range(5), [9] * 5), np.concatenate(alone))
    assert np.array_equal(uniform([4, 3, 2, 1, 0], [9] * 5), np.concatenate(alone[::-1]))


def test_uniform_fills_the_unit_interval_evenly():
    u = uniform([7] * 40_000, range(40_000))
    assert u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_square = ((counts - 800) ** 2 / 800).sum()
    assert chi_square < 85.35, "99.9 % quantile for 49 degrees of freedom"


def test_seed_and_position_use_all_their_bits():
    seeds = [0, 1, -1, 1 << 32, MAX_SEED, -MAX_SEED]
    positions = [0, 1, 1 << 31, 1 << 32]
    drawn = {float(uniform([s], [p])[0]) for s in seeds for p in positions}
    assert len(drawn) == len(seeds) * len(positions)


def test_streams_are_independent():
    plain, other = uniform([7] * 20_000, range(20_000)), uniform([7] * 20_000, range(20_000), 2)
    assert abs(np.corrcoef(plain, other)[0, 1]) < 0.03
    counts = np.histogram(other, bins=50, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 85.35, "99.9 % quantile for 49 degrees of freedom"


def test_child_seeds_are_distinct_and_repeatable():
    seeds = [child_seed(seed, index) for seed in (0, 1, 7, -3) for index in range(64)]
    assert len(set(seeds)) == len(seeds)
    assert child_seed(7, 0) == 7 and child_seed(7, 5) == child_seed(7, 5)
    assert all(-MAX_SEED <= seed <= MAX_SEED for seed in seeds)


def test_random_seeds_differ():
    assert len({random_seed() for _ in range(100)}) == 100
