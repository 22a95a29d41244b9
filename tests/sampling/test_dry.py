"""DRY against brute force (``support/sampling_oracle.py``) on texts that repeat themselves."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_oracle import dry

from oxillama_torch.sampling.chain import adjust
from oxillama_torch.sampling.dry import RepeatTracker, suffix_matches
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.row import SamplingRow

texts = st.lists(st.integers(0, 3), max_size=24)


@given(texts)
def test_suffix_matches_are_common_suffixes(tokens):
    found = suffix_matches(tokens).tolist()
    for j in range(len(tokens) - 1):
        length = 0
        while length <= j and tokens[j - length] == tokens[-1 - length]:
            length += 1
        assert found[j] == length


@given(
    prompt=texts,
    output=texts,
    window=st.integers(-1, 20),
    allowed=st.integers(0, 3),
    breakers=st.lists(
        st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple), max_size=3, unique=True
    ),
)
@settings(max_examples=400, deadline=None)
def test_penalties_are_those_of_brute_force(prompt, output, window, allowed, breakers):
    params = SamplingParams(
        seed=1,
        dry_multiplier=0.8,
        dry_penalty_last_n=window,
        dry_allowed_length=allowed,
        dry_sequence_breakers=breakers,
    )
    row = SamplingRow(params, prompt)
    for number in range(len(output) + 1):
        logits = torch.linspace(-1, 1, 5)[None]
        expected = logits[0].numpy().astype(np.float64)
        if window:
            expected = dry(expected, params, prompt, output[:number])
        assert np.allclose(adjust(logits, [row])[0].numpy(), expected, rtol=1e-6)
        if number < len(output):
            row.accept(output[number])


def test_the_example_of_llama_cpp():
    """``a b c c b c y a b c``: c would make 3 tokens 4, b one token 2, y two tokens 3."""
    tokens = [ord(letter) for letter in "abccbcyabc"]
    params = SamplingParams(dry_multiplier=1.0, dry_base=2.0, dry_sequence_breakers=())
    ids, amounts = RepeatTracker(params, tokens).penalties()
    found = {chr(i): float(amount) for i, amount in zip(ids, amounts)}
    assert found == {"c": 2.0, "y": 1.0}, "a repetition of one token is allowed"


@pytest.mark.parametrize("base", [1.0, 1.75, 1000.0])
def test_endless_repetition_does_not_overflow(base):
    params = SamplingParams(dry_multiplier=1000, dry_base=base, dry_sequence_breakers=())
    tracker = RepeatTracker(params, [7] * 5000)
    for _ in range(300):
        tracker.add(7)
    ids, amounts = tracker.penalties()
    assert ids.tolist() == [7] and np.isfinite(amounts).all() and amounts[0] >= 1000


def test_long_texts_keep_growing():
    """Beyond the arrays' first capacity, against a tracker that is told all at once."""
    rng = random.Random(3)
    tokens = [rng.randrange(3) for _ in range(2000)]
    params = SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=((2, 2, 1),))
    grown = RepeatTracker(params, tokens[:10])
    for token_id in tokens[10:]:
        grown.add(token_id)
    for found, expected in zip(grown.penalties(), RepeatTracker(params, tokens).penalties()):
        assert np.array_equal(found, expected)
