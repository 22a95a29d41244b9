"""One step's sampling: log-probabilities against numpy's log_softmax, faults of single rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampling_oracle import log_softmax

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.history import TokenHistory
from oxillama_torch.sampling.logprobs import token_logprobs
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.sampler import sample

PROMPT = [1, 2]


def greedy(**options) -> SamplingRow:
    return SamplingRow(SamplingParams(temperature=0, **options), PROMPT)


@pytest.mark.parametrize("vocabulary", [5, 1000, 32_000])
def test_logprobs_are_those_of_the_raw_distribution(vocabulary):
    logits = torch.randn(3, vocabulary) * 4
    bias = {0: 50.0}
    out = sample(logits, [greedy(logprobs=4, logit_bias=bias), greedy(), greedy(logprobs=0)])
    assert out[0].token_id == out[0].logprobs.token_id == 0
    assert out[1].logprobs is None and out[2].logprobs.top == ()
    for row in (0, 2):
        expected, found = log_softmax(logits[row].numpy()), out[row].logprobs
        assert found.logprob == pytest.approx(expected[found.token_id], abs=2e-6)
        values = logits[row].tolist()
        order = sorted(range(vocabulary), key=lambda i: (-values[i], i))
        assert found.rank == 1 + order.index(found.token_id)
        assert [i for i, _ in found.top] == order[: len(found.top)]
        assert np.allclose([p for _, p in found.top], expected[order[: len(found.top)]], atol=2e-6)


def test_equal_logits_rank_by_lower_id():
    logits = torch.zeros(1, 6)
    found = token_logprobs(logits.repeat(6, 1), range(6), 3)
    assert [entry.rank for entry in found] == [1, 2, 3, 4, 5, 6]
    assert all([i for i, _ in entry.top] == [0, 1, 2] for entry in found)


def test_more_alternatives_than_tokens():
    out = sample(torch.randn(1, 4), [greedy(logprobs=100)])
    assert len(out[0].logprobs.top) == 4


def test_a_certain_token_has_logprob_zero():
    logits = torch.tensor([[100.0, -100.0, -100.0]])
    assert token_logprobs(logits, [0], 0)[0].logprob == 0.0


def test_many_rows_are_measured_in_parts():
    """More rows than fit one part, against the same rows one at a time: the same bits."""
    logits = torch.randn(200, 65_000)
    ids = torch.randint(0, 65_000, (200,)).tolist()
    together = token_logprobs(logits, ids, 2)
    for index in (0, 128, 129, 199):
        assert token_logprobs(logits[index : index + 1], [ids[index]], 2) == [together[index]]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_fails_alone(poison):
    logits = torch.randn(4, 300)
    rows = [
        greedy(logprobs=2),
        SamplingRow(SamplingParams(seed=1, top_p=0.5, logprobs=1), PROMPT),
        greedy(logprobs=5),
        SamplingRow(SamplingParams(seed=2), PROMPT),
    ]
    clean = sample(logits, rows)
    broken = logits.clone()
    broken[1, 77] = poison
    out = sample(broken, rows)
    assert out[1].token_id is None and "not finite" in str(out[1].error)
    assert [out[i] for i in (0, 2, 3)] == [clean[i] for i in (0, 2, 3)]


def test_a_row_with_every_token_banned_fails_alone():
    ban = {i: float("-inf") for i in range(5)}
    rows = [
        greedy(),
        greedy(logit_bias=ban),
        SamplingRow(SamplingParams(logit_bias=ban, seed=1), [1]),
    ]
    out = sample(torch.randn(3, 5), rows)
    assert out[0].error is None
    assert all("banned" in str(entry.error) for entry in out[1:])
    assert all(isinstance(entry.error, RequestError) for entry in out[1:]), "who asks is at fault"


def test_a_row_without_tokens_has_no_logprobs_to_measure():
    """Of the masked logits nothing is left: no sum to take the logarithm of."""
    params = SamplingParams(
        temperature=0, logprobs=2, logprobs_mode="masked", processors=("nothing",)
    )
    nothing = [lambda ids, logits: torch.full_like(logits, -torch.inf)]
    row = SamplingRow(params, PROMPT, processors=nothing)
    out = sample(torch.randn(2, 5), [row, greedy(logprobs=2)])
    assert "banned" in str(out[0].error) and out[1].error is None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_do_not_depend_on_the_batch(device):
    logits = (torch.randn(7, 40_000) * 3).to(device)
    rows = [
        SamplingRow(SamplingParams(seed=i, logprobs=i, temperature=0.5 * i, top_k=3 * (i % 3)), [1])
        for i in range(7)
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]


def test_history_counts_many_tokens():
    history = TokenHistory([5, 5, 9])
    tokens = [token % 300 for token in range(1000)]
    for token_id in tokens:
        history.add(token_id)
    counts = dict(zip(history.ids.tolist(), history.counts.tolist()))
    assert counts == {i: tokens.count(i) for i in range(300)}
    assert TokenHistory([5, 5]).counts.tolist() == [0]


def test_tokens_the_model_must_not_choose():
    logits = torch.zeros(2, 50)
    logits[:, [8, 9]] = torch.tensor([5.0, 4.0])
    rows = [greedy(logprobs=1), SamplingRow(SamplingParams(seed=1, temperature=0.01), PROMPT)]
    out = sample(logits, rows, torch.tensor([8, 3]))
    assert [entry.token_id for entry in out] == [9, 9]
    assert out[0].logprobs.rank == 2 and out[0].logprobs.top[0][0] == 8, "of the raw distribution"
