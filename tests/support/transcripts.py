"""A transcript of tool calls for every family, written by hand after the models' own documentation
and templates: what tells the family in a template, its markers, the reply, the calls in it.
"""

from __future__ import annotations

import json

from replies import ByteVocabulary, make_family

OSLO = ("get_weather", {"city": "Oslo", "days": 2})
TIME = ("get-time", {})
CALLS = [OSLO, TIME]

DEEPSEEK_V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Oslo", "days": 2}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get-time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Oslo", "days": 2}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get-time<｜tool▁sep｜>{}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
DEEPSEEK_MARKS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
KIMI_MARKS = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)
HARMONY_MARKS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>")
GLM_MARKS = (
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)

FAMILIES = {
    "hermes": (
        "<tool_call>",
        ("<tool_call>", "</tool_call>"),
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n'
        '</tool_call>\n<tool_call>\n{"name": "get-time", "arguments": {}}\n</tool_call>',
        CALLS,
    ),
    "qwen-coder": (
        "<tool_call> <function= <parameter=",
        ("<tool_call>", "</tool_call>"),
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n"
        "2\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=get-time>\n</function>\n"
        "</tool_call>",
        CALLS,
    ),
    "glm": (
        "<tool_call> <arg_key>",
        GLM_MARKS,
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days"
        "</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>get-time\n</tool_call>",
        CALLS,
    ),
    "llama": (
        '<|start_header_id|> "parameters" tools',
        ("<|python_tag|>",),
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}',
        [OSLO],
    ),
    "mistral": (
        "[TOOL_CALLS]",
        ("[TOOL_CALLS]",),
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}, '
        '"id": "Xk2fT9aLq"}, {"name": "get-time", "arguments": {}, "id": "Xk2fT9aLr"}]',
        CALLS,
    ),
    "mistral-2025": (
        "[TOOL_CALLS] [CALL_ID] [ARGS]",
        ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
        '[TOOL_CALLS]get_weather[CALL_ID]Xk2fT9aLq[ARGS]{"city": "Oslo", "days": 2}'
        "[TOOL_CALLS]get-time[CALL_ID]Xk2fT9aLr[ARGS]{}",
        CALLS,
    ),
    "deepseek-v3": ("<｜tool▁calls▁begin｜> ```json", DEEPSEEK_MARKS, DEEPSEEK_V3, CALLS),
    "deepseek-v3.1": ("<｜tool▁calls▁begin｜>", DEEPSEEK_MARKS, DEEPSEEK_V31, CALLS),
    "lists": (
        "<|tool_call|> <|/tool_call|>",
        ("<|tool_call|>", "<|/tool_call|>"),
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}, '
        '{"name": "get-time", "arguments": {}}]<|/tool_call|>',
        CALLS,
    ),
    "glm-4.7": (
        "<tool_call> <arg_key>",
        GLM_MARKS,
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Oslo</arg_value><arg_key>days"
        "</arg_key><arg_value>2</arg_value></tool_call><tool_call>get-time</tool_call>",
        CALLS,
    ),
    "lists-in-lines": (
        "<tool_calls>\\n{ </tool_calls>",
        (),
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}\n'
        '{"name": "get-time", "arguments": {}}\n</tool_calls>',
        CALLS,
    ),
    "gemma": (
        '<|tool_call> <|"|>',
        ("<|tool_call>", "<tool_call|>", '<|"|>'),
        '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>'
        "<|tool_call>call:get-time{}<tool_call|>",
        CALLS,
    ),
    "phi": (
        "message['tools'] <|tool|>",
        ("<|tool_call|>", "<|/tool_call|>"),
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}, '
        '{"name": "get-time", "arguments": {}}]<|/tool_call|>',
        CALLS,
    ),
    "command-r": (
        "<|START_ACTION|>",
        ("<|START_ACTION|>", "<|END_ACTION|>"),
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        '{"city": "Oslo", "days": 2}},\n    {"tool_call_id": "1", "tool_name": "get-time", '
        '"parameters": {}}\n]<|END_ACTION|>',
        CALLS,
    ),
    "command-r-fenced": (
        "Action: ```json",
        (),
        'Action:\n```json\n[\n    {"tool_name": "get_weather", "parameters": {"city": "Oslo", '
        '"days": 2}},\n    {"tool_name": "get-time", "parameters": {}}\n]\n```',
        CALLS,
    ),
    "kimi": (
        "<|tool_calls_section_begin|>",
        KIMI_MARKS,
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        '<|tool_call_argument_begin|>{"city": "Oslo", "days": 2}<|tool_call_end|>'
        "<|tool_call_begin|>functions.get-time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        CALLS,
    ),
    "harmony": (
        "<|channel|> <|message|>",
        HARMONY_MARKS,
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Oslo", "days": 2}',
        [OSLO],
    ),
    "generic": (
        "",
        (),
        '{"name": "get_weather", "parameters": {"city": "Oslo", "days": 2}}\n'
        '{"name": "get-time", "parameters": {}}',
        CALLS,
    ),
}


def vocabulary_of(name, *, tokens=True, more=()):
    marks = FAMILIES[name][1]
    return ByteVocabulary((*marks, *more) if tokens else tuple(more))


def family(name, vocabulary):
    return make_family(FAMILIES[name][0], vocabulary)


def parsed(calls):
    return [(name, json.loads(arguments)) for name, arguments in calls]
