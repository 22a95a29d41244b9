"""llama-server's dialect. Oracles: the library for texts, numpy, its documented fields."""

import json
import math

import numpy as np
import pytest

from oxillama_torch.sampling.params import SamplingParams

PROMPT = "import os\n\ndef join("
GREEDY = {"prompt": PROMPT, "temperature": 0, "n_predict": 12}


def post(client, path, body):
    response = client.post(path, json=body)
    return response.status_code, response.get_json()


def events(client, body):
    response = client.post("/completion", json={**body, "stream": True})
    assert response.mimetype == "text/event-stream"
    frames = [f for f in response.get_data(as_text=True).split("\n\n") if f and f[0] != ":"]
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_completion_is_the_librarys_with_every_field(client, llm, model_id):
    status, answer = post(client, "/completion", {**GREEDY, "return_tokens": True})
    assert status == 200
    expected = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))[0]
    assert answer["content"] == expected.text
    assert answer["tokens"] == expected.token_ids
    assert (answer["stop"], answer["stop_type"], answer["stopping_word"]) == (True, "limit", "")
    assert (answer["model"], answer["prompt"], answer["index"]) == (model_id, PROMPT, 0)
    assert answer["tokens_evaluated"] == len(llm.tokenize(PROMPT))
    assert answer["tokens_predicted"] == 12
    assert answer["has_new_line"] == ("\n" in expected.text)
    timings = answer["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == answer["tokens_evaluated"]
    assert timings["predicted_n"] == 12
    assert timings["predicted_per_second"] == pytest.approx(12e3 / timings["predicted_ms"])
    assert answer["generation_settings"]["top_k"] == 40


def test_the_defaults_are_llama_servers(client):
    settings = client.get("/props").get_json()["default_generation_settings"]["params"]
    for name, value in {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0,
        "repeat_last_n": 64, "typical_p": 1.0, "seed": -1, "n_predict": -1, "mirostat": 0,
        "dry_base": 1.75, "xtc_threshold": 0.1, "min_keep": 0, "n_probs": 0,
    }.items():  # fmt: skip
        assert settings[name] == value, name
    assert settings["samplers"][-1] == "temperature"


def test_the_stream_is_the_answer(client):
    whole = post(client, "/completion", GREEDY)[1]
    got = events(client, {**GREEDY, "timings_per_token": True})
    assert "".join(e["content"] for e in got) == whole["content"]
    assert [e["stop"] for e in got] == [False] * (len(got) - 1) + [True]
    assert sum(len(e["tokens"]) for e in got) == 12
    assert got[0]["timings"]["predicted_n"] == 1
    assert got[-1]["stop_type"] == "limit"
    assert got[-1]["tokens_predicted"] == 12


def test_prompts_are_texts_ids_or_both(client, llm):
    ids = llm.tokenize(PROMPT)
    whole = post(client, "/completion", GREEDY)[1]["content"]
    tail = llm.tokenizer.encode("def join(", add_special=False)
    head = ids[: len(ids) - len(tail)]
    for prompt in (ids, [ids], [PROMPT]):
        answer = post(client, "/completions", {**GREEDY, "prompt": prompt})[1]
        assert answer["content"] == whole
    if head + tail == ids:
        assert post(client, "/completion", {**GREEDY, "prompt": [*head, "def join("]})[1][
            "content"
        ] == whole  # fmt: skip
    several = post(client, "/completion", {**GREEDY, "prompt": [PROMPT, ids, "x"], "n": 2})[1]
    assert [a["index"] for a in several] == list(range(6))
    assert [a["content"] for a in several[:4]] == [whole] * 4


def test_an_empty_prompt_is_the_beginning_of_a_text(client, llm):
    start = llm.tokenizer.bos_id if llm.tokenizer.bos_id is not None else llm.tokenizer.eos_id
    empty = post(client, "/completion", {**GREEDY, "prompt": ""})[1]
    assert (
        empty["content"] == post(client, "/completion", {**GREEDY, "prompt": [start]})[1]["content"]
    )


def test_prefill_alone(client):
    answer = post(client, "/completion", {**GREEDY, "n_predict": 0})[1]
    assert (answer["content"], answer["tokens_predicted"]) == ("", 0)
    assert answer["tokens_evaluated"] > 0


def test_words_and_ends_are_told_apart(client, llm):
    whole = post(client, "/completion", GREEDY)[1]["content"]
    word = whole[3:6]
    stopped = post(client, "/completion", {**GREEDY, "stop": [word, "zzz"]})[1]
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", word)
    assert stopped["content"] == whole[: whole.index(word)]
    assert events(client, {**GREEDY, "stop": word})[-1]["stopping_word"] == word
    eos = llm.tokenizer.eos_id
    ended = post(client, "/completion", {**GREEDY, "logit_bias": [[eos, 100.0]]})[1]
    assert (ended["stop_type"], ended["content"]) == ("eos", "")
    assert post(client, "/completion", {**GREEDY, "logit_bias": [[eos, 100]], "ignore_eos": True})[
        1
    ]["stop_type"] == "limit"  # fmt: skip


def test_probabilities_are_the_librarys(client, llm):
    answer = post(client, "/completion", {**GREEDY, "n_probs": 3})[1]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=3)
    expected = llm.generate(PROMPT, params)[0].logprobs
    got = answer["completion_probabilities"]
    assert [e["id"] for e in got] == [e.token_id for e in expected]
    assert [[t["id"] for t in e["top_logprobs"]] for e in got] == [
        [i for i, _ in e.top] for e in expected
    ]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine["logprob"] == pytest.approx(theirs.logprob, abs=1e-5)
        assert bytes(mine["bytes"]).decode("utf-8", "replace") == mine["token"]
        assert all(t["logprob"] <= 0 for t in mine["top_logprobs"])
    streamed = [e for e in events(client, {**GREEDY, "n_probs": 3}) if not e["stop"]]
    assert [e["completion_probabilities"][0]["id"] for e in streamed] == [e["id"] for e in got]


def test_biases_of_every_form(client, llm):
    whole = post(client, "/completion", {**GREEDY, "n_predict": 1, "return_tokens": True})[1]
    first = whole["tokens"][0]
    text = llm.tokenizer.token_bytes(first).decode()
    forms = [[[first, False]], {str(first): False}, [[first, -100]]]
    if llm.tokenizer.encode(text, add_special=False) == [first]:
        forms += [[[text, False]], {text: False}] if not text.isdecimal() else []
    for bias in forms:
        body = {**GREEDY, "n_predict": 1, "return_tokens": True, "logit_bias": bias}
        answer = post(client, "/completion", body)[1]
        assert answer["tokens"] != [first], bias


def test_seeds_and_grammars(client):
    body = {"prompt": PROMPT, "n_predict": 12, "seed": 7}
    texts = {post(client, "/completion", body)[1]["content"] for _ in range(2)}
    assert len(texts) == 1
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    answer = post(client, "/completion", {**GREEDY, "n_predict": 60, "json_schema": schema})[1]
    assert isinstance(json.loads(answer["content"])["a"], bool)
    answer = post(client, "/completion", {**GREEDY, "grammar": 'root ::= "yes" | "no"'})[1]
    assert answer["content"] in ("yes", "no")


def test_response_fields_are_picked(client):
    body = {**GREEDY, "response_fields": ["content", "generation_settings/n_predict", "nope"]}
    answer = post(client, "/completion", body)[1]
    assert set(answer) == {"content", "n_predict"}
    assert answer["n_predict"] == 12


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"post_sampling_probs": True}, "post_sampling_probs"), ({"id_slot": 2}, "id_slot"),
     ({"t_max_predict_ms": 5}, "t_max_predict_ms"), ({"prompt": []}, "prompt"),
     ({"prompt": [10**9]}, "prompt[0]"), ({"samplers": ["infill"]}, "samplers"),
     ({"grammar": "root ::= ("}, "grammar"),
     ({"grammar": 'root ::= "a"', "json_schema": {}}, "grammar"),
     ({"temperature": "hot"}, "temperature"),
     ({"logit_bias": [[1, True]]}, "logit_bias"), ({"logit_bias": [[1.5, 2]]}, "logit_bias"),
     ({"stream": True, "n": 2}, "stream"), ({"n_predict": -2}, "n_predict")],
)  # fmt: skip
def test_errors_have_llama_servers_form(client, fields, param):
    status, answer = post(client, "/completion", {**GREEDY, **fields})
    error = answer["error"]
    assert (status, error["code"], error["type"]) == (400, 400, "invalid_request_error")
    assert error["param"] == param
    assert error["message"]


def test_errors_of_other_kinds(client):
    status, answer = post(client, "/completion", {**GREEDY, "model": "nope"})
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    status, answer = post(client, "/completion", {**GREEDY, "prompt": "word " * 3000})
    assert (status, answer["error"]["type"]) == (400, "exceed_context_size_error")
    status, answer = post(client, "/completion", {**GREEDY, "lora": [{"id": 9, "scale": 1}]})
    assert (status, answer["error"]["reason"]) == (404, "adapter_not_found")


def test_unknown_fields_are_named_in_a_header(client):
    response = client.post("/completion", json={**GREEDY, "n_keep": 3, "temprature": 1})
    assert response.headers["x-ignored-fields"] == "temprature"


def test_templates_are_rendered_as_chat_renders_them(client, llm):
    messages = [{"role": "user", "content": "hi"}]
    prompt = post(client, "/apply-template", {"messages": messages})[1]["prompt"]
    assert prompt == llm.chat_template.render(messages)
    assert llm.tokenize(prompt, parse_special=True, add_special=False) in (
        llm.chat_ids(messages), llm.chat_ids(messages)[1:],
    )  # fmt: skip
    # What it gives can be completed: spellings of special tokens are such tokens here.
    answer = post(client, "/completion", {**GREEDY, "prompt": prompt})[1]
    expected = llm.chat(messages, SamplingParams(temperature=0, max_tokens=12))
    assert answer["content"] == expected.text


def test_slots_and_props(client, llm):
    props = client.get("/props").get_json()
    slots = client.get("/slots").get_json()
    assert props["total_slots"] == len(slots) == 32
    assert not any(slot["is_processing"] for slot in slots)
    assert props["default_generation_settings"]["n_ctx"] == llm.engine.max_context
    assert props["chat_template"] == llm.chat_template.source
    assert "/" not in props["model_path"]


def test_adapter_scales(client, llm, tmp_path):
    assert client.get("/lora-adapters").get_json() == []
    assert client.post("/lora-adapters", json=[]).get_json() == {"success": True}
    status, answer = post(client, "/lora-adapters", [{"id": 0, "scale": 1.0}])
    assert (status, answer["error"]["code"]) == (404, 404)
    assert post(client, "/lora-adapters", {})[0] == 400


@pytest.mark.parametrize(("order", "norm"), [(2, 2), (1, 1), (0, np.inf), (3, 3)])
def test_embeddings_are_scaled_by_the_norm_asked_for(client, order, norm):
    body = {"content": ["a b c", "def"], "embd_normalize": order}
    rows = [r["embedding"] for r in post(client, "/embedding", body)[1]]
    assert [len(row) for row in rows] == [1, 1]
    length = np.linalg.norm(np.array(rows, dtype=np.float64)[:, 0], ord=norm, axis=-1)
    assert np.allclose(length, 32760 if order == 0 else 1, rtol=1e-5)


def test_embeddings_without_pooling_are_rows_of_tokens(client, llm):
    answer = post(client, "/embeddings", {"input": "a b c", "pooling": "none"})[1]
    assert len(answer[0]["embedding"]) == len(llm.tokenize("a b c"))
    last = post(client, "/embedding", {"content": "a b c", "pooling": "last", "embd_normalize": -1})
    assert np.allclose(last[1][0]["embedding"][0], answer[0]["embedding"][-1], atol=1e-5)
    assert math.isfinite(sum(answer[0]["embedding"][0]))
