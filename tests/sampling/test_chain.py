"""The chain against ``support/sampling_oracle.py`` (numpy, one row at a time) and by frequency."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_oracle import adjusted, distribution

from oxillama_torch.sampling.chain import adjust, choose
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.philox import uniform
from oxillama_torch.sampling.row import SamplingRow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
VOCABULARY = 50
PROMPT = [1, 2, 2, 5]
END_IDS = [0, 49]

CASES = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_k_1": {"top_k": 1},
    "top_k_beyond": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "top_p_0": {"top_p": 0.0},
    "min_p": {"min_p": 0.2},
    "min_p_1": {"min_p": 1.0},
    "all_filters": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "bias": {"logit_bias": {3: 4.0, 7: -4.0, 9: float("-inf")}},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.4,
        "logit_bias": {2: 3.0, 6: 1.0},
        "top_p": 0.8,
    },
    "min_tokens": {"min_tokens": 9},
    "min_tokens_reached": {"min_tokens": 4},
}
OUTPUT = [5, 6, 6, 6]


def row_for(params: SamplingParams, output=OUTPUT) -> SamplingRow:
    row = SamplingRow(params, PROMPT, END_IDS)
    for token_id in output:
        row.accept(token_id)
    return row


def random_logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY) * 2


@pytest.mark.parametrize("case", CASES)
def test_adjusted_logits_match_the_definitions(case):
    params = SamplingParams(seed=1, **CASES[case])
    logits = random_logits(1)
    expected = adjusted(logits[0].numpy(), params, PROMPT, OUTPUT, END_IDS)
    before = logits.clone()
    assert np.allclose(adjust(logits, [row_for(params)])[0].numpy(), expected, rtol=1e-6)
    assert torch.equal(logits, before), "the raw logits are left as they are"


@pytest.mark.parametrize("case", CASES)
def test_draws_invert_the_cumulative_distribution(case):
    """For each draw, the token at which the oracle's cumulative distribution passes u."""
    draws = 300
    logits = random_logits(1)
    params = [SamplingParams(seed=seed, **CASES[case]) for seed in range(draws)]
    rows = [row_for(p) for p in params]
    chosen = choose(adjust(logits.repeat(draws, 1), rows), rows).numpy()
    expected = distribution(
        adjusted(logits[0].numpy(), params[0], PROMPT, OUTPUT, END_IDS), params[0]
    )
    u = uniform(range(draws), [len(PROMPT) + len(OUTPUT)] * draws)
    cumulative = np.cumsum(expected)
    below = np.where(chosen > 0, cumulative[chosen - 1], 0.0)
    assert (expected[chosen] > 0).all(), "a token that was dropped was drawn"
    assert ((below - 1e-6 <= u) & (u <= cumulative[chosen] + 1e-6)).all()


def test_frequencies_follow_the_distribution():
    draws = 20_000
    params = SamplingParams(seed=3, temperature=0.8, top_k=12, top_p=0.95)
    logits = random_logits(1)
    rows = []
    for position in range(draws):
        rows.append(SamplingRow(params, PROMPT))
        rows[-1].position = position
    counts = np.bincount(choose(logits.expand(draws, -1), rows).numpy(), minlength=VOCABULARY)
    expected = distribution(logits[0].numpy().astype(np.float64), params) * draws
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_square < 31.3, "99.9 % quantile for 11 degrees of freedom"


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [7, 30]] = 5.0
    rows = [row_for(SamplingParams(temperature=t)) for t in (0, 1e-7)]
    assert choose(logits, rows).tolist() == [7, 7]


def test_filters_break_ties_by_lower_id():
    logits = torch.zeros(1, VOCABULARY)
    seen = set()
    for seed in range(200):
        row = SamplingRow(SamplingParams(seed=seed, top_k=3), PROMPT)
        seen.add(int(choose(logits, [row])[0]))
    assert seen == {0, 1, 2}


def test_a_nucleus_wider_than_the_first_candidates():
    """A flat distribution needs most of the vocabulary; the search widens until it has them."""
    vocabulary = 5000
    logits = torch.randn(1, vocabulary) * 1e-3
    params = [SamplingParams(seed=seed, top_p=0.9) for seed in range(400)]
    chosen = choose(logits.expand(400, -1), [SamplingRow(p, PROMPT) for p in params])
    kept = distribution(logits[0].numpy().astype(np.float64), params[0]) > 0
    assert kept.sum() > 4000 and kept[chosen.numpy()].all()
    assert len(set(chosen.tolist())) > 300


def test_tiny_temperatures_do_not_overflow():
    logits = torch.tensor([[3e38, -3e38, 2.9e38]])
    row = SamplingRow(SamplingParams(seed=1, temperature=2e-5), PROMPT)
    assert choose(logits, [row]).tolist() == [0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 32_001])
def test_a_row_does_not_depend_on_its_neighbours(vocabulary, device):
    """All cases in one batch, in another order, and alone: the same tokens."""
    logits = (torch.randn(len(CASES) + 1, vocabulary) * 3).to(device)
    settings = [*CASES.values(), {"temperature": 0}]
    rows = [row_for(SamplingParams(seed=index, **s)) for index, s in enumerate(settings)]
    together = choose(adjust(logits, rows), rows).tolist()
    order = torch.randperm(len(rows)).tolist()
    shuffled_rows = [rows[i] for i in order]
    shuffled = choose(adjust(logits[order], shuffled_rows), shuffled_rows).tolist()
    alone = [
        int(choose(adjust(logits[i : i + 1].clone(), [row]), [row])[0])
        for i, row in enumerate(rows)
    ]
    assert together == alone
    assert shuffled == [together[i] for i in order]
