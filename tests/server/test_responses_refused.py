"""What ``/v1/responses`` refuses, and how it says so. Oracle: OpenAI's envelope and codes."""

import pytest
from waiting import idle, until

QUESTION = "What does `textwrap.dedent` do?"
TOOL = {
    "type": "function", "name": "decide", "description": "Decide.", "strict": True,
    "parameters": {"type": "object", "properties": {"yes": {"type": "boolean"}},
                   "required": ["yes"], "additionalProperties": False},
}  # fmt: skip


@pytest.fixture
def ask(client, model_id):
    def ask(status, **fields):
        answer = client.post("/v1/responses", json={"model": model_id, **fields})
        assert answer.status_code == status, answer.text
        return answer.get_json()["error"]

    return ask


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"model": "nope"}, "model", "model_not_found"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": None}, "input", "missing_required_parameter"),
        ({"n": 2}, "n", "invalid_value"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"background": True, "store": False}, "background", "invalid_value"),
        ({"prompt": {"id": "x"}}, "prompt", "unsupported_parameter"),
        ({"include": ["nothing"]}, "include[0]", "invalid_value"),
        ({"truncation": "never"}, "truncation", "invalid_value"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_type"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", None),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [TOOL, TOOL]}, "tools[1]", None),
        ({"tool_choice": "required"}, "tool_choice", None),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", None),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", None),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 5}}}},
         "text.format.schema", None),
        ({"previous_response_id": "resp_nope"}, "previous_response_id",
         "previous_response_not_found"),
        ({"previous_response_id": "\x00"}, "previous_response_id", "previous_response_not_found"),
        ({"previous_response_id": "a", "conversation": "b"}, "conversation", None),
        ({"conversation": "conv_nope"}, None, "not_found"),
        ({"lora": "nope"}, "lora", "adapter_not_found"),
    ],
)  # fmt: skip
def test_bad_field_is_named(ask, fields, param, code):
    statuses = dict.fromkeys(("model_not_found", "not_found", "adapter_not_found"), 404)
    error = ask(statuses.get(code, 400), **{"input": QUESTION, **fields})
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code


def test_fields_without_effect_are_named(client, model_id):
    fields = {"text": {"verbosity": "low"}, "prompt_cache_key": "k", "service_tier": "flex"}
    answer = client.post(
        "/v1/responses", json={"model": model_id, "input": "x", "max_output_tokens": 2, **fields}
    )
    assert answer.headers["x-ignored-fields"] == "prompt_cache_key, service_tier, text.verbosity"


def test_a_stream_without_room_generates_nothing(make_app):
    app = make_app(max_streams=1, model_alias="m")
    engine = app.extensions["service"].engine
    body = {"model": "m", "input": "hello", "stream": True, "ignore_eos": True, "store": False}
    with app.extensions["lifecycle"].running(lambda error: None):
        assert app.test_client().post("/v1/responses", json=body).status_code == 503
    until(lambda: idle(engine), "the request is not cut")
    # It was cut, not finished.
    assert engine.stats()["steps"] < engine.max_context // 2
