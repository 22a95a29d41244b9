"""Constraints over HTTP: what comes out obeys, what cannot be obeyed is refused by name.

Oracles: jsonschema, Python's ``re``, and the OpenAI SDK's models for answers.
"""

from __future__ import annotations

import json
import re
import threading
import time

import jsonschema
import pytest
from openai.types import Completion
from waiting import until

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "ok": {"type": "boolean"},
        "sizes": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 4},
    },
    "required": ["name", "ok", "sizes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}


@pytest.fixture
def complete(client, model_id):
    def post(**body):
        body = {"model": model_id, "prompt": "A thing: ", "max_tokens": 120, "seed": 4, **body}
        return client.post("/v1/completions", json=body)

    return post


def is_thing(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


@pytest.mark.parametrize(
    ("field", "value", "obeys"),
    [
        ("json_schema", SCHEMA, is_thing),
        ("response_format", FORMAT, is_thing),
        ("regex", "[ab]{3}-[0-9]{2}", lambda text: re.fullmatch("[ab]{3}-[0-9]{2}", text)),
        ("choice", ["rouge", "vert", "bleu"], lambda text: text in ("rouge", "vert", "bleu")),
        (
            "grammar",
            'root ::= item ("\\n" item){2}\nitem ::= "- " [a-f]{1,5}',
            lambda text: re.fullmatch(r"- [a-f]{1,5}(\n- [a-f]{1,5}){2}", text),
        ),
    ],
)
def test_every_field_is_obeyed(complete, field, value, obeys):
    answer = Completion.model_validate(complete(**{field: value}, n=3).get_json())
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and obeys(choice.text), choice.text


def test_streams_and_stop_strings_combine(complete):
    whole = complete(json_schema=SCHEMA).get_json()["choices"][0]["text"]
    lines = complete(json_schema=SCHEMA, stream=True).get_data(as_text=True).split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
    cut = complete(json_schema=SCHEMA, stop="ok").get_json()["choices"][0]
    assert cut["text"] == whole.partition("ok")[0] and cut["finish_reason"] == "stop"


def test_logprobs_of_what_the_constraint_leaves(complete):
    answers = [
        complete(choice=["0", "1"], logprobs=5, max_tokens=1, **mode).get_json()["choices"][0]
        for mode in ({}, {"logprobs_mode": "raw"}, {"logprobs_mode": "masked"})
    ]
    assert answers[0] == answers[1]
    top = answers[2]["logprobs"]["top_logprobs"][0]
    assert top.keys() <= {"0", "1"} and len(answers[0]["logprobs"]["top_logprobs"][0]) >= 5
    assert complete(logprobs_mode="processed").status_code == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"json_schema": {"not": {}}}, "json_schema.not"),
        (
            {"json_schema": {"properties": {"a b": {"items": {"uniqueItems": True}}}}},
            "json_schema.properties.a b.items.uniqueItems",
        ),
        ({"json_schema": {"anyOf": [{}, {"format": "wkt"}]}}, "json_schema.anyOf[1].format"),
        ({"json_schema": {"x-guidance": {"lenient": True}}}, "json_schema.x-guidance"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema.$ref"),
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": {"if": {}}}}},
            "response_format.json_schema.schema.if",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"grammar": 'root ::= root "a"'}, "grammar"),
        ({"regex": "(?=a)b"}, "regex"),
        ({"choice": []}, "choice"),
        ({"grammar": 'root ::= "a"', "regex": "a"}, "regex"),
        ({"regex": "a", "response_format": FORMAT}, "regex"),
    ],
)
def test_refusals_name_the_place(complete, body, param):
    answer = complete(**body)
    error = answer.get_json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (
        400,
        param,
        "invalid_request_error",
    ), error
    assert not re.search(r"0x[0-9a-f]{6,}|backtrace|/home|/usr|site-packages|panic", str(error))


@pytest.mark.parametrize("depth", [200, 990, 1010, 5000])
def test_a_schema_nested_without_end_is_refused(client, model_id, depth):
    schema = '{"items":' * depth + "{}" + "}" * depth
    body = json.dumps({"model": model_id, "prompt": "x"})[:-1] + f',"json_schema":{schema}}}'
    answer = client.post("/v1/completions", data=body, content_type="application/json")
    assert answer.status_code == 400


HOSTILE = {
    "a million bytes": {"grammar": 'root ::= "' + "a" * 1_000_000 + '"'},
    "left recursion": {"grammar": 'root ::= a\na ::= b? a "x" | "y"\nb ::= "z"'},
    "exponential schema": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"{k}{i}": {"type": "string"}}} for k in "ab"]}
                for i in range(24)
            ]
        }
    },
    "patterns that multiply": {
        "json_schema": {
            "allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(5, 40)]
        }
    },
    "a large prime": {"json_schema": {"type": "integer", "multipleOf": 1_000_003}},
    "catastrophic expression": {"regex": "(a?){500}a{500}"},
    "a long repetition": {"regex": "a{1000000000}"},
    "rules without end": {
        "structured_outputs": {
            "grammar": "start: r0\n"
            + "".join(f"r{i}: r{i + 1}\n" for i in range(5000))
            + 'r5000: "a"'
        }
    },
}


def test_hostile_constraints_harm_nobody(make_app, model_id):
    """16 streams run on while each of these is sent; every one is refused within a second."""
    app = make_app()
    arrivals: list[list[float]] = [[] for _ in range(16)]

    def read(index: int) -> None:
        body = {"model": model_id, "prompt": f"{index}: ", "max_tokens": 900, "stream": True}
        body |= {"ignore_eos": True, "seed": index}
        response = app.test_client().post("/v1/completions", json=body)
        for _ in response.response:
            arrivals[index].append(time.monotonic())
            if stop.is_set():
                break
        response.close()

    stop = threading.Event()
    streams = [threading.Thread(target=read, args=(index,)) for index in range(16)]
    for stream in streams:
        stream.start()
    try:
        client = app.test_client()
        client.post("/v1/completions", json={"model": model_id, "prompt": "x", "regex": "a"})
        took = {}
        for name, fields in HOSTILE.items():
            started = time.monotonic()
            body = {"model": model_id, "prompt": "x", "max_tokens": 4, **fields}
            assert client.post("/v1/completions", json=body).status_code == 400, name
            took[name] = time.monotonic() - started
        # Refusals may be over before sixteen streams have begun on a busy machine.
        until(lambda: all(len(times) > 5 for times in arrivals), "the streams do not run")
    finally:
        stop.set()
        for stream in streams:
            stream.join()
    gaps = [b - a for times in arrivals for a, b in zip(times, times[1:])]
    print(f"longest gap {max(gaps):.3f} s, refused in {took}")
