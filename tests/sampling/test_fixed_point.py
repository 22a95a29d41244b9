"""Integer weights and ordered keys against numpy; bits do not depend on the number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oxillama_torch.sampling.fixed_point import (
    MAX_VOCABULARY,
    ONE,
    ordered_keys,
    steady_sum,
    weights,
)

SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, -3e38, -torch.inf, 2.0, 2.0, -2.0]


def test_weights_are_probabilities():
    x = torch.randn(3, 1000) * 5
    mass = weights(x, x.amax(-1, keepdim=True)).double()
    expected = np.exp(x.numpy().astype(np.float64))
    expected /= expected.sum(-1, keepdims=True)
    assert np.allclose(mass / mass.sum(-1, keepdim=True), expected, rtol=1e-6, atol=1e-12)


def test_the_largest_row_does_not_overflow():
    mass = weights(torch.zeros(1, MAX_VOCABULARY), torch.zeros(1, 1))
    assert int(mass.cumsum(-1)[0, -1]) == MAX_VOCABULARY * ONE


def test_minus_infinity_weighs_nothing():
    assert weights(torch.tensor([[0.0, -torch.inf]]), torch.zeros(1, 1)).tolist() == [[ONE, 0]]


def test_keys_order_by_value_then_by_lower_column():
    keys = ordered_keys(torch.tensor([SPECIAL]))[0].tolist()
    expected = sorted(range(len(SPECIAL)), key=lambda i: (-SPECIAL[i], i))
    assert sorted(range(len(SPECIAL)), key=lambda i: -keys[i]) == expected
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 33, 4097, 151_936])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_rows_or_threads(vocabulary, threads):
    x = torch.randn(9, vocabulary) * 6
    peak = x.amax(-1, keepdim=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = weights(x, peak)
        torch.set_num_threads(threads)
        for row in (0, 4, 8):
            alone = weights(x[row : row + 1].clone(), peak[row : row + 1])
            assert torch.equal(alone[0], together[row])
            assert torch.equal(alone.sum(-1)[0], together.sum(-1)[row])
            assert torch.equal(alone.cumsum(-1)[0], together.cumsum(-1)[row])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("columns", [1, 2, 7, 33, 4097, 128_256])
def test_steady_sums_depend_on_nothing_but_the_row(columns):
    x = torch.randn(9, columns, dtype=torch.float64).exp()
    together = steady_sum(x)
    assert np.allclose(together, x.numpy().sum(-1), rtol=1e-12)
    padded = torch.nn.functional.pad(x, (0, 300))
    for row in (0, 4, 8):
        assert torch.equal(steady_sum(x[row : row + 1].clone())[0], together[row])
        assert torch.equal(steady_sum(padded)[row], together[row]), "zeros at the end are free"
