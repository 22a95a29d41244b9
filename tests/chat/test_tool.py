"""Tool definitions and choices. Oracle: the API reference."""

import pytest

from oxillama_torch.chat.tool import ToolChoice, tools_from
from oxillama_torch.errors import RequestError

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}


def test_nested_and_flat_definitions_are_one():
    assert tools_from([TOOL]) == tools_from([{"type": "function", **FUNCTION}])
    [tool] = tools_from([TOOL])
    assert tool.definition() == TOOL


@pytest.mark.parametrize(
    ("definitions", "param"),
    [
        ([5], "tools[0]"),
        ([TOOL, {"type": "web_search"}], "tools[1].type"),
        ([{"type": "function", "function": 5}], "tools[0].function"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name"),
        ([{"type": "function", "name": ""}], "tools[0].name"),
        ([{"type": "function", "name": "f", "description": 1}], "tools[0].description"),
        ([{"type": "function", "name": "f", "parameters": []}], "tools[0].parameters"),
        (
            [{"type": "function", "name": "f", "parameters": {"type": "string"}}],
            "tools[0].parameters.type",
        ),
        ([TOOL, TOOL], "tools[1]"),
        ([TOOL] * 129, "tools"),
    ],
)
def test_bad_definitions_are_named(definitions, param):
    with pytest.raises(RequestError) as caught:
        tools_from(definitions)
    assert caught.value.param == param


def test_strict_needs_closed_objects_with_all_properties_required():
    inner = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
    outer = {
        "type": "object",
        "properties": {"a": inner},
        "required": ["a"],
        "additionalProperties": False,
    }
    function = {"name": "f", "strict": True, "parameters": outer}
    with pytest.raises(RequestError) as caught:
        tools_from([{"type": "function", "function": function}])
    assert caught.value.param == "tools[0].function.parameters.properties.a"
    inner["additionalProperties"] = False
    [tool] = tools_from([{"type": "function", "function": function}])
    assert tool.strict


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"anyOf": 5, "$defs": 7}}, "$defs": []},
        {"properties": {"a": 5}},
        {"properties": {"a": {"properties": 5}}},
        {"properties": {"a": {}}, "required": [["a"]]},
        {"properties": {"a": {}}, "required": 5},
    ],
)
def test_strict_schemas_that_are_none(parameters):
    function = {"name": "f", "strict": True, "parameters": parameters}
    parameters["additionalProperties"] = False
    with pytest.raises(RequestError) as caught:
        tools_from([{"type": "function", "function": function}])
    assert caught.value.param.startswith("tools[0].function.parameters")


@pytest.mark.parametrize(
    ("value", "mode", "names"),
    [
        (None, "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ("=f", "required", {"f"}),
        ({"type": "function", "function": {"name": "f"}}, "required", {"f"}),
        ({"type": "function", "name": "f"}, "required", {"f"}),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
            "auto",
            {"f"},
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}],
            },
            "required",
            {"f"},
        ),
    ],
)
def test_choices(value, mode, names):
    choice = ToolChoice.of(value, tools_from([TOOL]))
    assert (choice.mode, choice.names) == (mode, names)
    assert [tool.name for tool in choice.pick(tools_from([TOOL]))] == (
        [] if mode == "none" else ["f"]
    )


@pytest.mark.parametrize(
    "value",
    ["always", "=g", {"type": "function"}, {"type": "custom"}, {"type": "allowed_tools"}, 5, []],
)
def test_bad_choices(value):
    with pytest.raises(RequestError) as caught:
        ToolChoice.of(value, tools_from([TOOL]))
    assert caught.value.param.startswith("tool_choice")


def test_there_must_be_tools_to_choose_from():
    assert ToolChoice.of("auto", ()).pick(()) == ()
    with pytest.raises(RequestError):
        ToolChoice.of("required", ())
