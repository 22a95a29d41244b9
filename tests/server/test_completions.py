"""Text completions. Oracles: the openai SDK's models, ``LLM.generate`` and ``LLM.score``."""

import json

import pytest
from openai.types import Completion

from oxillama_torch.sampling.params import SamplingParams

PROMPT = "def add(a, b):\n    return"


def _post(client, model_id, **fields):
    body = {"model": model_id, "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    return client.post("/v1/completions", json={**body, **fields})


def test_answer_is_the_librarys(client, model_id, llm):
    answer = Completion.model_validate(_post(client, model_id).get_json())
    expected = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))[0]
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason


def test_every_prompt_form(client, model_id, llm):
    ids = llm.tokenize(PROMPT)
    forms = [PROMPT, [PROMPT], ids, [ids]]
    answers = [_post(client, model_id, prompt=form).get_json() for form in forms]
    texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(ids)}


def test_choices_of_several_prompts_are_in_order(client, model_id):
    prompts = [PROMPT, "import os\n"]
    singles = [_post(client, model_id, prompt=p).get_json()["choices"][0]["text"] for p in prompts]
    choices = _post(client, model_id, prompt=prompts, n=2).get_json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["text"] for choice in choices] == [s for s in singles for _ in range(2)]


def test_echo_scores_the_prompt_as_lm_eval_reads_it(client, model_id, llm):
    ids = llm.tokenize(PROMPT)
    answer = _post(client, model_id, prompt=[ids], echo=True, logprobs=1, max_tokens=1).get_json()
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:-1] == llm.score(ids).logprobs[1:]
    text = answer["choices"][0]["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        assert text[offset:].startswith(token)


def test_echo_without_new_tokens(client, model_id):
    answer = _post(client, model_id, echo=True, max_tokens=0, logprobs=0).get_json()
    assert answer["choices"][0]["text"] == PROMPT
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("echo", [False, True], ids=["plain", "echo"])
def test_stream_adds_up_to_the_whole(client, model_id, echo):
    fields = {"logprobs": 2, "echo": echo, "n": 2}
    whole = _post(client, model_id, **fields).get_json()
    response = _post(
        client, model_id, stream=True, stream_options={"include_usage": True}, **fields
    )
    frames = [f[6:] for f in response.get_data(as_text=True).split("\n\n") if f[:5] == "data:"]
    events = [json.loads(frame) for frame in frames[:-1]]
    assert frames[-1] == "[DONE]"
    for index, choice in enumerate(whole["choices"]):
        parts = [c for e in events for c in e["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [item for part in parts for item in part["logprobs"][name]]
            assert joined == choice["logprobs"][name]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        pytest.param({"prompt": []}, "prompt", id="no-prompt"),
        pytest.param({"prompt": [[]]}, "prompt[0]", id="no-tokens"),
        pytest.param({"prompt": [[10**9]]}, "prompt[0]", id="token-out-of-range"),
        pytest.param({"prompt": [[-1]]}, "prompt[0]", id="negative-token"),
        pytest.param({"suffix": "x"}, "suffix", id="suffix"),
        pytest.param({"best_of": 0}, "best_of", id="best-of"),
        pytest.param({"max_tokens": -1}, "max_tokens", id="max-tokens"),
    ],
)
def test_bad_field_is_named(client, model_id, change, param):
    response = _post(client, model_id, **change)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param


def test_only_unsupported_values_are_refused(client, model_id):
    assert _post(client, model_id, best_of=1, suffix="").status_code == 200


def test_greedy_ignores_the_seed_and_sampling_obeys_it(client, model_id):
    def text(**fields):
        return _post(client, model_id, max_tokens=16, **fields).get_json()["choices"][0]["text"]

    assert text(seed=1) == text(seed=2)
    assert text(seed=1, temperature=2) == text(seed=1, temperature=2)


def test_hopeless_prompts_are_refused_before_they_are_encoded(client, model_id, llm, monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("encoded all the same")

    long = "word " * 100_000
    monkeypatch.setattr(type(llm.tokenizer), "encode", encode)
    for path, body in (
        ("/v1/completions", {"prompt": long}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
    ):
        response = client.post(path, json={"model": model_id, **body})
        assert response.status_code == 400
        assert response.get_json()["error"]["code"] == "context_length_exceeded"
