"""Sampling over HTTP: every field reaches the sampler, none out of range does.

Oracle: the library with the same parameters (one engine serves both), and the status codes and
``param`` of OpenAI's errors.
"""

from __future__ import annotations

import math

import pytest
import torch

from oxillama_torch import SamplingParams
from oxillama_torch.sampling.custom import register_processor
from oxillama_torch.sampling.presets import PRESETS, preset

PROMPT = "def parse(text):"

FIELDS = {
    "samplers": ["top_k", "typ_p", "temperature"],
    "top_k": 30,
    "min_p": 0.1,
    "min_keep": 3,
    "repetition_penalty": 1.2,
    "repeat_last_n": 20,
    "dry_multiplier": 0.7,
    "dry_base": 1.5,
    "dry_allowed_length": 1,
    "dry_penalty_last_n": 50,
    "dry_sequence_breakers": ["\n", [5, 6]],
    "top_n_sigma": 1.5,
    "typical_p": 0.8,
    "top_a": 0.1,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.02,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "dynatemp_range": 0.3,
    "dynatemp_exponent": 2.0,
    "mirostat": 2,
    "mirostat_tau": 3.0,
    "mirostat_eta": 0.2,
    "bad_words": ["return", [7]],
    "allowed_token_ids": [*range(500)],
    "min_tokens": 4,
    "stop_token_ids": [9],
    "ignore_eos": True,
}


def complete(client, model_id, **fields):
    body = {"model": model_id, "prompt": PROMPT, "seed": 5, "max_tokens": 12, **fields}
    return client.post("/v1/completions", json=body)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_does_what_it_does_in_the_library(client, model_id, llm, name):
    value = FIELDS[name]
    answer = complete(client, model_id, **{name: value}).get_json()
    library = ("top_k", "typical_p", "temperature") if name == "samplers" else value
    params = SamplingParams(seed=5, max_tokens=12, **{name: library})
    assert answer["choices"][0]["text"] == llm.generate(PROMPT, params)[0].text


@pytest.mark.parametrize("name", PRESETS)
def test_presets(client, model_id, llm, name):
    answer = complete(client, model_id, sampler_preset=name, repeat_penalty=1.3).get_json()
    params = preset(name, seed=5, max_tokens=12, repetition_penalty=1.3)
    assert answer["choices"][0]["text"] == llm.generate(PROMPT, params)[0].text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -1),
        ("top_k", 10**30),
        ("top_k", 1.5),
        ("min_p", 1.5),
        ("min_p", "0.1"),
        ("typical_p", float("nan")),
        ("temperature", float("inf")),
        ("xtc_probability", -0.1),
        ("mirostat", 3),
        ("mirostat_tau", -1),
        ("repeat_last_n", -2),
        ("repetition_penalty", 0),
        ("dry_base", 0.5),
        ("dry_multiplier", 1e30),
        ("dry_sequence_breakers", [""]),
        ("dry_sequence_breakers", ["x"] * 33),
        ("samplers", ["top_k", "tok_p"]),
        ("samplers", ["top_k", "top_k"]),
        ("samplers", "kz"),
        ("sampler_preset", "nobody's"),
        ("bad_words", [""]),
        ("bad_words", [[10**9]]),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [-1]),
        ("processors", ["os.system"]),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_what_cannot_be_is_refused_by_name(client, model_id, name, value, path):
    body = {"model": model_id, "max_tokens": 2, name: value}
    body |= (
        {"prompt": "a"}
        if path == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    param = answer.get_json()["error"]["param"]
    if isinstance(value, float) and not math.isfinite(value):
        assert param is None, "no JSON at all"
    else:
        assert param.startswith(name)


def test_processors_only_from_the_list_of_the_server(make_app, llm, model_id):
    """One that the process knows is no use to a request unless the server was told of it."""
    register_processor("test-hidden", lambda ids, logits: logits)
    client = make_app(processors=("loudest=sample_processors:loudest",)).test_client()
    assert complete(client, model_id, processors=["test-hidden"]).status_code == 400
    answer = complete(client, model_id, processors=["loudest"], logprobs=0).get_json()
    assert set(answer["choices"][0]["logprobs"]["tokens"]) == {llm.detokenize([300])}


def test_a_processor_that_fails_ends_its_own_request(llm):
    def fails_for_seven(ids, logits):
        return logits[:-1] if ids[0] == 7 else logits.log() if ids[0] == 8 else logits

    llm.register_processor("test-fails", fails_for_seven)
    params = SamplingParams(temperature=0, max_tokens=5, processors=["test-fails"])
    for first, message in ((7, "returned no logits of shape"), (8, "NaN or plus infinity")):
        with pytest.raises(Exception, match=message):
            llm.generate([first, 9], params)
    plain = SamplingParams(temperature=0, max_tokens=5)
    assert llm.generate([6, 9], params)[0].token_ids == llm.generate([6, 9], plain)[0].token_ids


def test_a_processor_sees_the_tokens_so_far(llm):
    seen = []

    def watch(ids, logits):
        seen.append(list(ids))
        return torch.where(torch.arange(len(logits)) == 11 + len(ids), 0.0, -torch.inf)

    llm.register_processor("test-watch", watch)
    params = SamplingParams(max_tokens=3, processors=["test-watch"], logit_bias={14: -5.0})
    [done] = llm.generate([3, 4], params)
    assert done.token_ids == [13, 14, 15]
    assert seen == [[3, 4], [3, 4, 13], [3, 4, 13, 14]]
