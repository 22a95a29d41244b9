"""Events of one response. Oracle: the openai SDK's models, and its own stream state."""

import json

import openai
import pytest
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from response_skeleton import skeleton

from oxillama_torch.errors import CapacityError, EngineError, RequestError
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.server.output import (
    Finished,
    Piece,
    Reasoning,
    Started,
    ToolCallArguments,
    ToolCallStarted,
)
from oxillama_torch.server.responses.builder import ResponseBuilder

EVENT = TypeAdapter(ResponseStreamEvent)
CALLS = [
    Started(0, 10, 4, None),
    Reasoning(0, "let me "),
    Reasoning(0, "see"),
    Piece(0, "I will ", 1, None),
    Piece(0, "look.", 2, None),
    ToolCallStarted(0, 0, "call_a", "find"),
    ToolCallArguments(0, 0, '{"x"'),
    ToolCallArguments(0, 0, ": 1}"),
    ToolCallStarted(0, 1, "call_b", "now"),
    ToolCallArguments(0, 1, "{}"),
    Finished(0, "tool_calls", 9, 3),
]


class Words:
    """A tokenizer whose tokens are their own numbers."""

    def token_bytes(self, token_id):
        return str(token_id).encode()


def run(outputs, end="finish", logprobs=False, **fields):
    """All events of a response, as they go over the wire, checked one by one."""
    builder = ResponseBuilder(skeleton(**fields), Words(), logprobs=logprobs)
    lines = []

    def emit(events):
        lines.extend(json.dumps(event) for event in events)

    emit(builder.open())
    for output in outputs:
        emit(builder.add(output))
    emit(builder.finish() if end == "finish" else end(builder))
    emit([builder.last_event()])
    events = [json.loads(line) for line in lines]
    for number, event in enumerate(events):
        EVENT.validate_python(event, strict=True)
        assert event["sequence_number"] == number
    return events


def replay(events):
    """What the SDK makes of a stream: it raises on events that do not fit together."""
    state = ResponseStreamState(input_tools=[], text_format=openai.omit)
    for event in events:
        state.handle_event(EVENT.validate_python(event))
    return state


def test_whole_turn_with_reasoning_text_and_calls():
    events = run(CALLS)
    replay(events)
    response = Response.model_validate(events[-1]["response"], strict=True)
    assert [item.type for item in response.output] == [
        "reasoning", "message", "function_call", "function_call",
    ]  # fmt: skip
    reasoning, message, first, second = response.output
    assert reasoning.content[0].text == "let me see"
    assert message.content[0].text == response.output_text == "I will look."
    assert (first.call_id, first.name, json.loads(first.arguments)) == ("call_a", "find", {"x": 1})
    assert (second.call_id, second.arguments) == ("call_b", "{}")
    assert all(item.status == "completed" for item in response.output)
    assert response.status == "completed"
    assert response.usage.input_tokens == 10
    assert response.usage.input_tokens_details.cached_tokens == 4
    assert response.usage.output_tokens == 9
    assert response.usage.output_tokens_details.reasoning_tokens == 3
    assert response.usage.total_tokens == 19


def test_events_come_in_the_documented_order():
    kinds = [event["type"].removeprefix("response.") for event in run(CALLS)]
    text = ["content_part.added", "output_text.delta", "output_text.delta", "output_text.done"]
    thought = ["content_part.added", "reasoning_text.delta", "reasoning_text.delta"]
    delta = "function_call_arguments.delta"
    call = ["output_item.added", delta, "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", *thought, "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", *text, "content_part.done", "output_item.done",
        *call[:2], *call[1:], *call,
        "completed",
    ]  # fmt: skip


def test_deltas_join_to_what_is_done():
    events = run(CALLS)
    for kind, field in (
        ("output_text", "text"),
        ("reasoning_text", "text"),
        ("function_call_arguments", "arguments"),
    ):
        joined = {}
        for event in events:
            if event["type"] == f"response.{kind}.delta":
                joined[event["item_id"]] = joined.get(event["item_id"], "") + event["delta"]
        done = {e["item_id"]: e[field] for e in events if e["type"] == f"response.{kind}.done"}
        assert joined == done
        assert done


def test_finished_arguments_name_their_function():
    """Which older SDKs (2.54) need, and newer ones no longer."""
    done = [e for e in run(CALLS) if e["type"] == "response.function_call_arguments.done"]
    assert [event["name"] for event in done] == ["find", "now"]


def test_length_is_incomplete():
    events = run([Started(0, 1, 0, None), Piece(0, "a", 1, None), Finished(0, "length", 1)])
    response = Response.model_validate(events[-1]["response"], strict=True)
    assert events[-1]["type"] == "response.incomplete"
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"


def test_answer_without_text_is_an_empty_message():
    events = run([Started(0, 1, 0, None), Finished(0, "stop", 1)])
    replay(events)
    response = Response.model_validate(events[-1]["response"], strict=True)
    assert response.output[0].content[0].text == ""


def test_queued_response_says_so_first():
    events = run([Finished(0, "stop", 0)], status="queued")
    assert [event["type"] for event in events[:3]] == [
        "response.created", "response.queued", "response.in_progress",
    ]  # fmt: skip
    assert [e["response"]["status"] for e in events[:3]] == ["queued", "queued", "in_progress"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("broken"), "server_error"),
        (RequestError("bad"), "invalid_prompt"),
        (RequestError("full", status=503), "server_error"),
        (CapacityError("busy"), "rate_limit_exceeded"),
        (KeyError("secret"), "server_error"),
    ],
)
def test_failure_ends_open_items_and_tells_no_secrets(error, code):
    events = run(CALLS[:5], end=lambda builder: builder.fail(error))
    replay(events)
    response = Response.model_validate(events[-1]["response"], strict=True)
    assert events[-1]["type"] == "response.failed"
    assert response.error.code == code
    assert "secret" not in response.error.message
    assert response.output[-1].status == "incomplete"
    assert [e["type"] for e in events].count("response.output_item.done") == 2


def test_cancelled_response_keeps_what_there_is():
    events = run(CALLS[:7], end=lambda builder: builder.cancel())
    response = Response.model_validate(events[-1]["response"], strict=True)
    assert response.status == "cancelled"
    assert response.output[-1].arguments == '{"x"'


def test_logprobs_stand_in_deltas_and_in_the_text():
    entry = TokenLogprobs(7, -0.5, 1, ((7, -0.5), (8, -1.5)))
    outputs = [Piece(0, "a", 7, entry), Piece(0, "", 7, entry), Finished(0, "stop", 2)]
    events = run(outputs, logprobs=True)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [len(delta["logprobs"]) for delta in deltas] == [1, 1]
    assert deltas[0]["logprobs"][0]["top_logprobs"][1] == {"token": "8", "logprob": -1.5}
    part = Response.model_validate(events[-1]["response"], strict=True).output[0].content[0]
    assert [entry.bytes for entry in part.logprobs] == [[55], [55]]
