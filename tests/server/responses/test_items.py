"""Items. Oracle: the SDK's models for the full form; for messages, what chat templates take."""

from typing import Union, get_args

import pytest
from openai.types.conversations import ConversationItem
from openai.types.responses import ResponseItem, ResponseReasoningItem
from pydantic import TypeAdapter

from oxillama_torch.errors import RequestError
from oxillama_torch.server.responses.items import items_page, messages_of, parse_items

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
TURN = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
        {"type": "reasoning_text", "text": "hm"}]},
    {"role": "assistant", "content": "b"},
    CALL,
    OUTPUT,
    {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "content": [
        {"type": "output_text", "text": "c", "annotations": []}]},
    {"role": "user", "content": "d"},
]  # fmt: skip


# Version 1 of the SDK has it in its streams, and not in the union for lists.
if ResponseReasoningItem not in get_args(get_args(ResponseItem)[0]):
    ResponseItem = Union[ResponseItem, ResponseReasoningItem]  # noqa: UP007


def parse(items, find=lambda name: None):
    return parse_items(items, "input", find)


@pytest.mark.parametrize("model", [ResponseItem, ConversationItem])
def test_full_form_is_valid(model):
    items = parse([*TURN, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}])
    for item in items:
        TypeAdapter(model).validate_python(item, strict=True)
    assert items[2]["id"] == "rs_1"
    assert len({item["id"] for item in items}) == len(items)


def test_messages_are_those_of_the_turns():
    assert messages_of(parse(TURN)) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]  # fmt: skip


@pytest.mark.parametrize("items", [[CALL], [OUTPUT], [OUTPUT, CALL]])
def test_calls_and_outputs_belong_together(items):
    with pytest.raises(RequestError, match="c1") as error:
        messages_of(parse(items))
    assert (error.value.status, error.value.param) == (400, "input")


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "robot", "content": "x"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": 5}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0].type"),
        ({"type": "computer_call"}, "input[0].type"),
        ({"type": 5}, "input[0].type"),
        ({}, "input[0].id"),
        ({"type": "message", "role": "user", "content": "x", "id": "nul\x00"}, "input[0].id"),
        ({**OUTPUT, "call_id": None}, "input[0].call_id"),
        ({"type": "item_reference", "id": "msg_none"}, "input[0].id"),
    ],
)
def test_bad_item_is_named(item, param):
    with pytest.raises(RequestError) as error:
        parse([item])
    assert error.value.param == param
    assert error.value.status in (400, 404)


def test_reference_brings_the_stored_item():
    stored = parse([{"role": "user", "content": "x"}])[0]
    assert parse([{"id": stored["id"]}], {stored["id"]: stored}.get) == [stored]


def test_pages():
    items = [{"id": f"i{n}"} for n in range(5)]
    page = items_page(items, limit=2, order="desc")
    assert ([i["id"] for i in page["data"]], page["has_more"]) == (["i4", "i3"], True)
    page = items_page(items, limit=5, order="desc", after="i3")
    assert ([i["id"] for i in page["data"]], page["has_more"]) == (["i2", "i1", "i0"], False)
    page = items_page(items, limit=5, order="asc", before="i2")
    assert [i["id"] for i in page["data"]] == ["i0", "i1"]
    with pytest.raises(RequestError):
        items_page(items, limit=5, order="asc", after="x")
