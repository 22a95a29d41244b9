"""``best_of`` and ``use_beam_search`` over HTTP.

Oracles: the library (compared with transformers in tests/test_search.py), the openai SDK's model.
"""

from __future__ import annotations

import pytest
from openai.types import Completion

from oxillama_torch import SamplingParams
from oxillama_torch.config import ServerConfig
from oxillama_torch.search import begin
from oxillama_torch.server.beams import BeamGeneration
from oxillama_torch.server.service import Service

PROMPT = "def parse(text):"


def complete(client, model_id, **fields):
    body = {"model": model_id, "prompt": PROMPT, "max_tokens": 6, **fields}
    return client.post("/v1/completions", json=body)


def test_beams_are_those_of_the_library(client, model_id, llm):
    prompts = [PROMPT, "import "]
    options = {"length_penalty": 0.5, "early_stopping": "never"}
    answer = complete(
        client,
        model_id,
        prompt=prompts,
        use_beam_search=True,
        n=2,
        best_of=3,
        logprobs=2,
        **options,
    ).get_json()
    Completion.model_validate(answer)
    expected = llm.beam_search(prompts, width=3, max_tokens=6, **options)
    beams = [beam for found in expected for beam in found[:2]]
    assert [choice["text"] for choice in answer["choices"]] == [beam.text for beam in beams]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, beam in zip(answer["choices"], beams):
        assert choice["finish_reason"] == beam.finish_reason
        assert choice["logprobs"]["token_logprobs"] == [e.logprob for e in beam.logprobs]
        assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(len(llm.tokenize(prompt)) for prompt in prompts)
    assert usage["completion_tokens"] == sum(len(beam.token_ids) for beam in beams)


def test_best_of_is_the_best_of_the_library(client, model_id, llm):
    answer = complete(client, model_id, n=2, best_of=5, seed=3, temperature=1.2).get_json()
    Completion.model_validate(answer)
    params = SamplingParams(n=2, seed=3, temperature=1.2, max_tokens=6)
    expected = llm.generate(PROMPT, params, best_of=5)
    assert [choice["text"] for choice in answer["choices"]] == [c.text for c in expected]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    every = llm.generate(PROMPT, SamplingParams(n=5, seed=3, temperature=1.2, max_tokens=6))
    assert answer["usage"]["completion_tokens"] == sum(len(c.token_ids) for c in every)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 65}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"early_stopping": True}, "early_stopping"),
        ({"use_beam_search": True, "stream": True}, "stream"),
        ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
        ({"use_beam_search": True, "top_k": 5}, "top_k"),
        ({"use_beam_search": True, "stop": ["x"]}, "stop"),
        ({"use_beam_search": True, "length_penalty": 1e9}, "length_penalty"),
        ({"use_beam_search": True, "n": 100}, "n"),
        ({"use_beam_search": True, "max_tokens": 0}, "max_tokens"),
        ({"use_beam_search": True, "prompt": [10**6]}, "prompt[0]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, model_id, fields, param):
    answer = complete(client, model_id, **fields)
    assert answer.status_code == 400
    assert answer.get_json()["error"]["param"] == param


def test_a_search_that_is_given_up_leaves_nothing_running(llm):
    """Whoever reads gets the reason; the engine has no request of it left."""
    service = Service.from_llm(llm, ServerConfig())
    options = {"width": 3, "max_tokens": 500}
    found = begin(llm.tokenize(PROMPT), llm.engine, llm.tokenizer, **options)
    generation = BeamGeneration(service, [found], 1, 0)
    outputs = generation.outputs()
    first_step = found.advance

    def advance(entries):
        first_step(entries)
        generation.abort(ConnectionError("gone"))

    found.advance = advance
    with pytest.raises(ConnectionError, match="gone"):
        next(outputs)
    stats = llm.engine.stats()
    assert stats["running"] == stats["waiting"] == 0


def test_a_search_keeps_its_deadline(make_app, llm):
    client = make_app(request_timeout_s=1e-6).test_client()
    model_id = client.get("/v1/models").get_json()["data"][0]["id"]
    answer = complete(client, model_id, use_beam_search=True)
    assert answer.status_code == 408
