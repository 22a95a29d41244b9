"""Tools, reasoning and formats over HTTP. Oracle: the openai SDK's models, ``jsonschema`` for what
was asked to follow a schema.
"""

import json

import jsonschema
import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
DAYS = {
    "type": "object",
    "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["days"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": CITY, "wait": DAYS}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTION = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture
def post(client, model_id):
    def post(**fields):
        body = {"model": model_id, "messages": QUESTION, "max_tokens": 80, "seed": 1}
        return client.post("/v1/chat/completions", json={**body, "tools": TOOLS, **fields})

    return post


def events_of(response):
    frames = response.get_data(as_text=True).split("\n\n")
    data = [frame[6:] for frame in frames if frame.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(item) for item in data[:-1]]


def check_calls(message):
    assert message.tool_calls
    for call in message.tool_calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return message.tool_calls


def test_required_calls_follow_their_schemas(post):
    answer = ChatCompletion.model_validate(
        post(tool_choice="required", temperature=1.5, n=4).get_json(), strict=True
    )
    assert len(answer.choices) == 4
    ids = set()
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        ids |= {call.id for call in check_calls(choice.message)}
    assert len(ids) == sum(len(choice.message.tool_calls) for choice in answer.choices)


def test_a_named_function_is_called_once(post):
    """Once: OpenAI's models make one call then, and clients rely on it."""
    choice = {"type": "function", "function": {"name": "wait"}}
    answer = ChatCompletion.model_validate(post(tool_choice=choice).get_json())
    assert [c.function.name for c in check_calls(answer.choices[0].message)] == ["wait"]


def test_allowed_tools(post):
    allowed = {"mode": "required", "tools": [TOOLS[1]]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = ChatCompletion.model_validate(post(tool_choice=choice).get_json())
    assert {c.function.name for c in check_calls(answer.choices[0].message)} == {"wait"}


def test_one_call_at_a_time(post):
    response = post(tool_choice="required", parallel_tool_calls=False, n=4, temperature=1.5)
    for choice in ChatCompletion.model_validate(response.get_json()).choices:
        assert len(check_calls(choice.message)) == 1


def test_the_model_calls_by_itself(post):
    """The demo model has learnt to call when it sees tools; the constraint begins at its marker."""
    answer = ChatCompletion.model_validate(post(temperature=0).get_json())
    assert answer.choices[0].finish_reason == "tool_calls"
    check_calls(answer.choices[0].message)


def test_none_is_no_call(post):
    message = post(tool_choice="none", temperature=0).get_json()["choices"][0]["message"]
    assert "tool_calls" not in message
    assert message["content"]


@pytest.mark.parametrize("n", [1, 3])
def test_streamed_calls_add_up(post, n):
    fields = {"tool_choice": "required", "temperature": 1.2, "n": n}
    whole = ChatCompletion.model_validate(post(**fields).get_json())
    events = events_of(post(**fields, stream=True))
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    # The SDK's own way of putting a stream together; it doubles an id that is sent twice.
    state = ChatCompletionStreamState()
    for chunk in chunks:
        state.handle_chunk(chunk)
    for ours, theirs in zip(state.get_final_completion().choices, whole.choices, strict=True):
        assert ours.finish_reason == theirs.finish_reason == "tool_calls"
        assert ours.message.role == "assistant"
        calls = check_calls(ours.message)
        assert all(call.id.startswith("call_") and len(call.id) == 29 for call in calls)
        pairs = zip(calls, theirs.message.tool_calls, strict=True)
        assert all(
            (a.function.name, a.function.arguments) == (b.function.name, b.function.arguments)
            for a, b in pairs
        )
    arguments = [
        call["function"]["arguments"]
        for event in events
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls") or []
    ]
    assert sum(map(bool, arguments)) > 2  # in fragments
    deltas = [c["delta"] for event in events for c in event["choices"]]
    assert [d.get("role") for d in deltas].count("assistant") == n


def test_a_call_that_is_cut_off_says_so(post):
    choice = post(tool_choice="required", max_tokens=12).get_json()["choices"][0]
    assert choice["finish_reason"] == "length"


def test_logprobs_of_calls_are_those_of_every_token(post):
    answer = post(tool_choice="required", logprobs=True, top_logprobs=1).get_json()
    items = answer["choices"][0]["logprobs"]["content"]
    assert len(items) == answer["usage"]["completion_tokens"]
    streamed = events_of(post(tool_choice="required", logprobs=True, stream=True))
    count = sum(
        len(choice["logprobs"]["content"])
        for event in streamed
        for choice in event["choices"]
        if choice["logprobs"]
    )
    assert count == len(items)


def test_results_go_back_through_the_template(post, client, llm):
    first = post(tool_choice="required", parallel_tool_calls=False).get_json()
    message = first["choices"][0]["message"]
    [call] = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "Snow."}
    answer = post(messages=[*QUESTION, message, result], tool_choice="none", temperature=0)
    assert answer.status_code == 200
    history = [*QUESTION, {**message, "content": ""}, result]
    ids = llm.chat_template.render_ids(history)
    assert answer.get_json()["usage"]["prompt_tokens"] == len(ids)
    prompt = llm.detokenize(ids)
    assert "<tool_response>\nSnow.\n</tool_response>" in prompt
    assert json.loads(prompt.split("<tool_call>")[1].split("</tool_call>")[0]) == {
        "name": call["function"]["name"],
        "arguments": json.loads(call["function"]["arguments"]),
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_its_schema(post, stream):
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": DAYS, "strict": True}}
    response = post(tools=None, response_format=wanted, temperature=1.0, stream=stream)
    if stream:
        deltas = [c["delta"] for event in events_of(response) for c in event["choices"]]
        content = "".join(delta.get("content") or "" for delta in deltas)
    else:
        content = response.get_json()["choices"][0]["message"]["content"]
    jsonschema.validate(json.loads(content), DAYS)


def test_a_json_object_begins_with_a_bracket(post):
    """The demo model's strings have no end; it is enough to see that it could not do otherwise."""
    wanted = {"type": "json_object"}
    answer = post(tools=None, response_format=wanted, temperature=0, max_tokens=8).get_json()
    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
        ({"grammar": 'start: "yes" | "no"'}, {"yes", "no"}),
        ({"choice": ["red", "green"]}, {"red", "green"}),
        ({"regex": "[ab]"}, {"a", "b"}),
        ({"json_schema": {"enum": [1, 2]}}, {"1", "2"}),
        ({"structured_outputs": {"choice": ["x"]}}, {"x"}),
        ({"structured_outputs": {"json": {"const": 3}}}, {"3"}),
    ],
)
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_grammars_and_the_like(client, model_id, route, fields, expected):
    chat = route.startswith("chat")
    asked = {"messages": QUESTION} if chat else {"prompt": "def"}
    body = {"model": model_id, "max_tokens": 20, **asked, **fields}
    choice = client.post(f"/v1/{route}", json=body).get_json()["choices"][0]
    assert (choice["message"]["content"] if chat else choice["text"]) in expected
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"regex": "a", "choice": ["b"]}, "choice"),
        ({"regex": "("}, "regex"),
        ({"grammar": 'root ::= "a'}, "grammar"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
        ({"reasoning_budget": -2}, "reasoning_budget"),
    ],
)
def test_bad_fields_are_named(post, fields, param):
    response = post(**{"tools": None, **fields} if "tool_choice" not in fields else fields)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param
