"""Each step of the chain: what it keeps, how often it draws it, and that it minds its own row.

Oracle: ``support/sampling_oracle.py``, the definitions in numpy, one row at a time.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import adjusted, distribution, penalised, softmax

from oxillama_torch.sampling.chain import adjust, choose, probabilities
from oxillama_torch.sampling.params import DEFAULT_SAMPLERS, SamplingParams
from oxillama_torch.sampling.row import SamplingRow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [1, 2, 2, 5]
OUTPUT = [5, 6, 6, 6]
LLAMA_ORDER = [
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typical_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
]

CASES = {
    "top-n-sigma": {"top_n_sigma": 1.2},
    "top_n_sigma_of_few": {"top_n_sigma": 0.7, "allowed_token_ids": (3, 4, 5, 20, 21, 30)},
    "dynatemp": {"dynatemp_range": 0.6, "dynatemp_exponent": 1.5},
    "dynatemp_down_to_0": {"temperature": 0.4, "dynatemp_range": 2.0},
    "dynatemp_exponent_0": {"dynatemp_range": 0.5, "dynatemp_exponent": 0.0},
    "typical": {"typical_p": 0.6},
    "typical_after_top_k": {"top_k": 12, "typical_p": 0.5},
    "typical_0": {"typical_p": 0.0},
    "top-a": {"top_a": 0.3},
    "epsilon": {"epsilon_cutoff": 0.02},
    "epsilon_beyond_all": {"epsilon_cutoff": 0.9},
    "eta": {"eta_cutoff": 0.02, "temperature": 2.0},
    "eta_narrow": {"eta_cutoff": 0.3, "temperature": 0.5},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "xtc_after_top_p": {"xtc_probability": 1.0, "xtc_threshold": 0.1, "top_p": 0.8},
    "xtc_threshold_0": {"xtc_probability": 1.0, "xtc_threshold": 0.0, "top_k": 7},
    "xtc_one_above": {"xtc_probability": 1.0, "xtc_threshold": 0.5},
    "xtc_min_keep": {"xtc_probability": 1.0, "xtc_threshold": 0.02, "min_keep": 49},
    "min-keep": {"min_keep": 9, "top_p": 0.1, "min_p": 0.9, "top_a": 0.9, "eta_cutoff": 0.5},
    "min_keep_typical": {"min_keep": 5, "typical_p": 0.1, "epsilon_cutoff": 0.4},
    "llama": {
        "samplers": LLAMA_ORDER,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
    },
    "llama-all": {
        "samplers": LLAMA_ORDER,
        "temperature": 1.7,
        "top_n_sigma": 2.0,
        "top_k": 30,
        "typical_p": 0.9,
        "top_p": 0.9,
        "min_p": 0.02,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.1,
    },
    "upside-down": {
        "samplers": DEFAULT_SAMPLERS[::-1],
        "xtc_probability": 1.0,
        "min_p": 0.05,
        "top_p": 0.95,
        "eta_cutoff": 0.01,
        "top_a": 0.1,
        "typical_p": 0.9,
        "top_k": 6,
        "temperature": 1.5,
        "top_n_sigma": 2.5,
    },
    "not-named": {"samplers": ("top_k",), "top_k": 5, "top_p": 0.1, "temperature": 3.0},
    "all": {
        "temperature": 1.3,
        "top_n_sigma": 3.0,
        "top_k": 45,
        "typical_p": 0.97,
        "top_a": 0.02,
        "epsilon_cutoff": 0.001,
        "eta_cutoff": 0.002,
        "top_p": 0.97,
        "min_p": 0.01,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.2,
    },
    "penalties": {"repeat_last_n": 3, "repetition_penalty": 1.6, "frequency_penalty": 0.7},
    "penalties_of_all": {"repeat_last_n": 99, "repetition_penalty": 1.4, "presence_penalty": 1.0},
    "penalties_off": {"repeat_last_n": 0, "repetition_penalty": 9.0, "presence_penalty": 9.0},
    "allowed": {"allowed_token_ids": (4, 7, 7, 12), "logit_bias": {3: 50.0}},
    "bad-words": {"bad_words": ((8,), (6, 6, 9), (5, 6, 10), (6, 11))},
    "dry": {"dry_multiplier": 0.9, "dry_allowed_length": 1, "dry_sequence_breakers": ((9,),)},
}


def row_for(case: str, seed: int = 1, **changes) -> SamplingRow:
    breakers = {} if case == "dry" else {"dry_sequence_breakers": ()}
    row = SamplingRow(SamplingParams(seed=seed, **{**breakers, **CASES[case], **changes}), PROMPT)
    for token_id in OUTPUT:
        row.accept(token_id)
    return row


@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("case", CASES)
def test_what_is_left_is_what_the_definition_leaves(case, vocabulary):
    logits = torch.randn(4, vocabulary) * 2
    rows = [row_for(case, seed) for seed in range(4)]
    found = probabilities(adjust(logits, rows), rows).numpy()
    for line, row in enumerate(rows):
        changed = adjusted(logits[line].numpy(), row.params, PROMPT, OUTPUT)
        expected = distribution(changed, row.params)
        assert np.array_equal(found[line] > 0, expected > 1e-13)
        assert np.allclose(found[line], expected, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if "_" not in case])
def test_frequencies_of_50000_draws(case):
    draws, vocabulary = 50_000, 50
    logits = torch.randn(1, vocabulary) * 1.5
    template = row_for(case)
    rows = []
    for position in range(draws):
        rows.append(copy.copy(template))
        rows[-1].position = position
    changed = adjust(logits, [template])
    counts = np.bincount(choose(changed.expand(draws, -1), rows).numpy(), minlength=vocabulary)
    oracle = adjusted(logits[0].numpy(), template.params, PROMPT, OUTPUT)
    assert_drawn_from(counts, distribution(oracle, template.params))


def assert_drawn_from(counts: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square test at one in 100,000; rare tokens are taken together."""
    draws = counts.sum()
    assert counts[expected == 0].sum() == 0, "a token that was dropped was drawn"
    common = expected * draws >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*(expected[common] * draws), max(expected[~common].sum() * draws, 1e-9)]
    if observed[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    chi_square = sum((o - w) ** 2 / w for o, w in zip(observed, wanted))
    freedom = max(len(observed) - 1, 1)
    # Wilson and Hilferty's approximation of the quantile.
    quantile = freedom * (1 - 2 / (9 * freedom) + 4.26 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < quantile


def test_xtc_happens_as_often_as_it_is_asked_to():
    """Its draw is independent of the token's: what is drawn mixes two distributions."""
    draws, logits = 50_000, torch.randn(1, 20) * 1.5
    template = SamplingRow(SamplingParams(seed=4, xtc_probability=0.3, xtc_threshold=0.1), PROMPT)
    rows = []
    for position in range(draws):
        rows.append(copy.copy(template))
        rows[-1].position = position
    counts = np.bincount(choose(logits.expand(draws, -1), rows).numpy(), minlength=20)
    plain = softmax(logits[0].numpy())
    excluded = distribution(logits[0].numpy(), template.params)
    assert (plain >= 0.1).sum() >= 2, "or there would be nothing to see"
    assert_drawn_from(counts, 0.7 * plain + 0.3 * excluded)


def test_penalties_may_come_after_the_temperature():
    """Then they look at the sign of the logits as they are at that point."""
    logits = torch.randn(1, 40) * 2
    order = ("top_k", "temperature", "penalties", "min_p")
    params = SamplingParams(
        seed=1, samplers=order, top_k=20, temperature=2.0, repetition_penalty=1.8, min_p=0.1
    )
    row = SamplingRow(params, PROMPT)
    x = logits[0].numpy().astype(np.float64)
    x = np.where(x >= np.sort(x)[-20], x / 2, -np.inf)
    expected = penalised(x, params, PROMPT, [])
    kept = softmax(expected) >= 0.1 * softmax(expected).max()
    found = probabilities(adjust(logits, [row]), [row])[0].numpy()
    assert np.allclose(found, softmax(np.where(kept, expected, -np.inf)), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.7, 0.01])
def test_cold_where_the_likeliest_is_gone(temperature):
    """What the steps before have left, sharpened: p ** (1 / T), in proportion."""
    before = ("typical_p", "top_p")
    changes = {"typical_p": 0.3, "top_p": 0.95, "temperature": temperature}
    logits = torch.tensor([[2.5, *(1.0 - 0.1 * i for i in range(30))]])
    left = probabilities(logits, [row_of(samplers=before, **changes)])[0].numpy()
    assert left[0] == 0 and np.count_nonzero(left) > 1, "the likeliest is not typical"
    expected = (left / left.max()) ** (1 / temperature)
    found = probabilities(logits, [row_of(samplers=(*before, "temperature"), **changes)])[0]
    assert np.allclose(found.numpy(), expected / expected.sum(), atol=1e-5)


def row_of(**params) -> SamplingRow:
    return SamplingRow(SamplingParams(seed=1, **params), [1])


def test_equal_logits_rank_by_lower_id_in_every_step():
    logits = torch.zeros(1, 600)
    for changes in ({"top_k": 3}, {"top_p": 3 / 600}, {"typical_p": 3 / 600}):
        row = SamplingRow(SamplingParams(seed=1, **changes), PROMPT)
        assert probabilities(logits, [row])[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    row = SamplingRow(SamplingParams(seed=1, xtc_probability=1, xtc_threshold=0.0), PROMPT)
    assert probabilities(logits, [row])[0].nonzero()[:, 0].tolist() == [599]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [50, 40_001])
def test_a_row_does_not_depend_on_its_neighbours(vocabulary, device):
    """All cases in one batch, in another order, and alone: the same bits."""
    names = [*CASES, *CASES]
    logits = (torch.randn(len(names), vocabulary) * 3).to(device)
    rows = [row_for(name, seed) for seed, name in enumerate(names)]
    together = probabilities(adjust(logits, rows), rows)
    tokens = choose(adjust(logits, rows), rows)
    order = torch.randperm(len(rows)).tolist()
    shuffled = [rows[i] for i in order]
    x = adjust(logits[order], shuffled)
    assert torch.equal(probabilities(x, shuffled), together[order])
    assert torch.equal(choose(x, shuffled), tokens[order])
    for line in range(0, len(rows), 3):
        x = adjust(logits[line : line + 1].clone(), [rows[line]])
        assert torch.equal(probabilities(x, [rows[line]])[0], together[line])


def ranges(low: float, high: float):
    return st.floats(low, high, width=32)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": ranges(0, 5),
            "top_k": st.integers(0, 80),
            "top_p": ranges(0, 1),
            "min_p": ranges(0, 1),
            "typical_p": ranges(0, 1),
            "top_a": ranges(0, 1),
            "epsilon_cutoff": ranges(0, 1),
            "eta_cutoff": ranges(0, 1),
            "top_n_sigma": ranges(-1, 5),
            "xtc_probability": ranges(0, 1),
            "xtc_threshold": ranges(0, 1),
            "dynatemp_range": ranges(0, 5),
            "dynatemp_exponent": ranges(0, 10),
            "mirostat": st.integers(0, 2),
            "mirostat_tau": ranges(0, 20),
            "min_keep": st.integers(0, 70),
            "repetition_penalty": ranges(0.5, 3),
            "repeat_last_n": st.integers(0, 9),
            "dry_multiplier": ranges(0, 9),
            "dry_allowed_length": st.integers(0, 4),
            "samplers": st.permutations(DEFAULT_SAMPLERS),
        },
    ),
    st.sets(st.integers(0, 59), max_size=58),
    st.integers(0, 2**31),
)
@settings(max_examples=300, deadline=None)
def test_any_mix_leaves_something_and_nothing_banned(changes, banned, seed):
    rng = random.Random(seed)
    logits = torch.tensor([[rng.choice([0.0, 1.0, rng.gauss(0, 4)]) for _ in range(60)]])
    bias = dict.fromkeys(banned, float("-inf"))
    params = SamplingParams(
        seed=seed, logit_bias=bias, bad_words=((3,), (1, 4)), dry_sequence_breakers=(), **changes
    )
    row = SamplingRow(params, [1, 2, 1, 2, 1])
    forbidden = banned | {3, 4}
    for _ in range(3):
        x = adjust(logits, [row])
        if len(forbidden) == 60:
            return
        share = probabilities(x, [row])
        assert float(share.sum()) == pytest.approx(1.0)
        assert not any(share[0, i] for i in (banned | {3}))
        token = int(choose(x, [row])[0])
        assert token not in banned and token != 3 and share[0, token] > 0
        row.accept(token)
