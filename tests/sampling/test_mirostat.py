"""Mirostat against its paper's formulas in numpy, and against what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_oracle import softmax

from oxillama_torch.sampling.chain import probabilities
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.sampler import sample

VOCABULARY = 1000


def kept_1(p: np.ndarray, mu: float) -> np.ndarray:
    """Algorithm 1 of Basu et al. 2021: Zipf's exponent from the 100 likeliest, then k."""
    order = np.argsort(-p, kind="stable")
    top = p[order][:100]
    t = np.log(np.arange(2, len(top) + 1) / np.arange(1, len(top)))
    s = (t * np.log(top[:-1] / top[1:])).sum() / (t**2).sum()
    e = s - 1
    k = (e * 2**mu / (1 - len(p) ** -e)) ** (1 / s)
    out = np.zeros(len(p))
    kept = order[: max(int(k), 1)]
    out[kept] = p[kept] / p[kept].sum()
    return out


def kept_2(p: np.ndarray, mu: float) -> np.ndarray:
    """Algorithm 2: surprise above mu is cut off."""
    kept = np.where(-np.log2(p) <= mu, p, 0)
    if not kept.any():
        kept[p.argmax()] = 1
    return kept / kept.sum()


@pytest.mark.parametrize("version", [1, 2])
def test_two_hundred_tokens_follow_the_algorithm(version):
    params = SamplingParams(seed=3, mirostat=version, mirostat_tau=3.0, mirostat_eta=0.2)
    row, mu = SamplingRow(params, [1]), 6.0
    for _ in range(200):
        logits = torch.randn(1, VOCABULARY) * 2
        expected = {1: kept_1, 2: kept_2}[version](softmax(logits[0].numpy()), mu)
        found = probabilities(logits, [row])[0].numpy()
        assert np.array_equal(found > 0, expected > 0)
        assert np.allclose(found, expected, atol=1e-6)
        [sampled] = sample(logits, [row])
        mu -= 0.2 * (-np.log2(expected[sampled.token_id]) - 3.0)
        row.accept(sampled.token_id)
        assert row.mu == pytest.approx(mu, abs=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_the_surprise_settles_at_the_target(version):
    params = SamplingParams(seed=3, mirostat=version, mirostat_tau=4.0, temperature=1.2)
    row, surprises = SamplingRow(params, [1]), []
    logits = torch.randn(1, VOCABULARY) * 2.5
    for _ in range(600):
        [sampled] = sample(logits, [row])
        # A token's error has moved mu by eta times as much.
        surprises.append(4.0 + (row.mu - row.next_mu) / params.mirostat_eta)
        row.accept(sampled.token_id)
    assert np.mean(surprises[200:]) == pytest.approx(4.0, abs=0.15)


def test_a_step_that_is_repeated_counts_once():
    """A failed step is run again for its requests one by one: mu moves when a token is accepted."""
    row = SamplingRow(SamplingParams(seed=1, mirostat=2), [1])
    logits = torch.randn(1, 50)
    first = sample(logits, [row])
    assert sample(logits, [row]) == first and row.mu == 10.0
    row.accept(first[0].token_id)
    assert row.mu != 10.0


@pytest.mark.parametrize("version", [1, 2])
def test_one_candidate_and_greedy(version):
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 7] = 1.0
    row = SamplingRow(SamplingParams(seed=1, mirostat=version), [1])
    assert probabilities(logits, [row])[0].nonzero().tolist() == [[7]]
    row = SamplingRow(SamplingParams(temperature=0, mirostat=version), [1])
    logits = torch.randn(1, 50)
    assert sample(logits, [row])[0].token_id == int(logits.argmax())
    row.accept(3)
    assert row.mu == 10.0 or row.next_mu is None
