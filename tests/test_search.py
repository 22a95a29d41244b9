"""Beam search and best-of.

Oracles: transformers' beam search on the weights of the same tiny file; the exhaustive search over
all texts of a tiny vocabulary (a beam as wide as there are texts must find the best of them).
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tiny_models import write_tiny

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.search import BeamSearch, search

PROMPT = [7, 300, 12, 95]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(our LLM, transformers model) on the same weights."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    oracle = write_tiny("qwen3", path)
    with LLM(path, device="cpu", max_batch_size=8) as llm:
        yield llm, oracle


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
def test_beams_are_those_of_transformers(tiny, length_penalty, early_stopping):
    llm, oracle = tiny
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    plain = llm.beam_search(PROMPT, width=3, max_tokens=6)[0]
    # Tokens that beams meet on their way, so that some end early.
    ends = {plain[0].token_ids[3], plain[2].token_ids[4]}
    wanted = BeamSearch(PROMPT, width=3, max_tokens=6, end_ids=frozenset(ends), **options)
    [beams] = search([wanted], llm.engine, llm.tokenizer)
    expected = oracle.generate(
        torch.tensor([PROMPT]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    for beam, row in zip(beams, expected.sequences.tolist()):
        found = [*PROMPT, *beam.token_ids]
        assert found == row[: len(found)] and set(row[len(found) :]) <= {min(ends)}
    if length_penalty <= 1:
        assert {len(beam.token_ids) for beam in beams} != {6}, "some have ended early"
    assert np.allclose([b.score for b in beams], expected.sequences_scores, atol=1e-4)


def chain_of(vocabulary: int, seed: int) -> np.ndarray:
    """Log-probabilities of the next token, by the number of tokens and the last of them."""
    logits = np.random.default_rng(seed).normal(size=(9, vocabulary, vocabulary)) * 2
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def run(search: BeamSearch, table: np.ndarray) -> None:
    """Play the engine."""
    while not search.done:
        found = []
        for request in search.requests():
            ids = request.prompt_token_ids
            row = table[len(ids), ids[-1]]
            top = sorted(enumerate(row.tolist()), key=lambda pair: (-pair[1], pair[0]))
            found.append(TokenLogprobs(top[0][0], top[0][1], 1, tuple(top)))
        search.advance(found)


def all_texts(table: np.ndarray, first: int, length: int, end: int):
    """(tokens, sum) of every text of at most ``length`` tokens that is over."""
    texts = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(table.shape[-1]), repeat=size):
            if end in tokens[:-1] or (size < length and tokens[-1] != end):
                continue
            path = [first, *tokens]
            steps = enumerate(itertools.pairwise(path), 1)
            texts.append((tokens, sum(table[n, a, b] for n, (a, b) in steps)))
    return texts


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_beam_as_wide_as_there_are_texts_finds_the_best(seed, penalty):
    table, end = chain_of(4, seed), 3
    found = BeamSearch(
        [0],
        width=64,
        max_tokens=4,
        length_penalty=penalty,
        early_stopping="never",
        end_ids=frozenset({end}),
    )
    run(found, table)
    texts = all_texts(table, 0, 4, end)
    best = sorted(texts, key=lambda text: -text[1] / len(text[0]) ** penalty)[:10]
    for beam, (tokens, total) in zip(found.best(), best):
        assert beam.token_ids == tokens
        assert math.isclose(beam.logprob, total, rel_tol=1e-9)
        assert beam.finish_reason == ("stop" if tokens[-1] == end else "length")


def test_banned_tokens_are_on_no_beam():
    table = chain_of(6, 1)
    likeliest = int(table[1, 0].argmax())
    found = BeamSearch([0], width=3, max_tokens=5, banned_ids=frozenset({likeliest}))
    run(found, table)
    assert len(found.best()) == 3
    assert all(likeliest not in beam.token_ids for beam in found.best())


def test_logprobs_are_those_of_scoring(tiny):
    llm, _ = tiny
    beam = llm.beam_search(PROMPT, width=2, max_tokens=5)[0][0]
    score = llm.score([*PROMPT, *beam.token_ids])
    assert [e.logprob for e in beam.logprobs] == score.logprobs[len(PROMPT) :]
    assert [e.token_id for e in beam.logprobs] == list(beam.token_ids)
    assert beam.text == llm.detokenize(beam.token_ids, skip_special=True)


def test_beams_share_the_pages_of_what_they_have_in_common(tiny):
    """Each step finds all but the last page of every beam in the prefix cache."""
    llm, _ = tiny
    prompt = [5 + i % 90 for i in range(200)]
    before = llm.engine.stats()
    llm.beam_search(prompt, width=4, max_tokens=8)
    after = llm.engine.stats()
    computed = after["prompt_tokens"] - before["prompt_tokens"]
    assert computed < 200 + 4 * 8 * after["page_size"]
    assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] > 4 * 6 * 180


@pytest.mark.parametrize(
    "options", [{"width": 0}, {"width": 65}, {"max_tokens": 0}, {"length_penalty": math.nan}]
)
def test_what_cannot_be_is_refused(tiny, options):
    with pytest.raises(RequestError):
        tiny[0].beam_search(PROMPT, **{"width": 2, "max_tokens": 2, **options})


def test_best_of_returns_the_likeliest_of_many(tiny):
    llm, _ = tiny
    params = SamplingParams(seed=4, max_tokens=6, n=2, temperature=1.5)
    best = llm.generate([PROMPT, PROMPT[:2]], params, best_of=6)
    for prompt, group in ((PROMPT, best[:2]), (PROMPT[:2], best[2:])):
        every = llm.generate([prompt], SamplingParams(seed=4, max_tokens=6, n=6, temperature=1.5))
        logprobs = [llm.score([*prompt, *c.token_ids]).logprobs[len(prompt) :] for c in every]
        means = [sum(values) / len(values) for values in logprobs]
        order = sorted(range(6), key=lambda i: -means[i])
        assert [c.token_ids for c in group] == [every[i].token_ids for i in order[:2]]
        assert all(c.logprobs is None and c.prompt_token_ids == prompt for c in group)
    with pytest.raises(RequestError, match="best_of"):
        llm.generate([PROMPT], params, best_of=1)
