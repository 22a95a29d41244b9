"""Turns made ready. Oracle: prompts written out by hand, and json; the tokenizer is the demo's."""

import json

import pytest
from replies import TOOLS
from transcripts import FAMILIES

from oxillama_torch.chat.prompt import Ask, prepare
from oxillama_torch.chat.tool import ToolChoice, tools_from
from oxillama_torch.config import demo_model_path
from oxillama_torch.errors import RequestError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.chat_template import ChatTemplate
from oxillama_torch.tokenizer.tokenizer import Tokenizer

ASK = {"messages": [{"role": "user", "content": "Hi"}], "params": SamplingParams()}
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
THINKING = PLAIN + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    with read_gguf(demo_model_path()) as gguf:
        return Tokenizer.from_gguf(gguf.metadata)


@pytest.fixture(scope="module")
def make(tokenizer):
    made = {}

    def make(source):
        if source not in made:
            made[source] = ChatTemplate(source, tokenizer)
        return made[source]

    yield make
    for template in made.values():
        template.close()


@pytest.fixture
def ready(make, tokenizer):
    def ready(source, **fields):
        return prepare(Ask(**{**ASK, **fields}), make(source), tokenizer)

    return ready


@pytest.fixture(scope="module")
def accepts(tokenizer):
    compiler = ConstraintCompiler(tokenizer)

    def accepts(constraint, text):
        matcher = compiler.matcher(constraint).inner
        ids = tokenizer.encode(text, add_special=False)
        return matcher.validate_tokens(ids) == len(ids) and (
            matcher.consume_tokens(ids) and matcher.is_accepting()
        )

    return accepts


def test_a_plain_turn_is_left_alone(ready, tokenizer):
    prompt = ready(PLAIN)
    assert tokenizer.decode(prompt.ids) == "[user] Hi\n[assistant]"
    assert prompt.params.constraint is None
    assert prompt.reply_format.thinking is None


@pytest.mark.parametrize("messages", [[], [5], [{"content": "x"}], [{"role": 5}]])
@pytest.mark.parametrize("name", ["generic", "phi", "mistral", "hermes"])
def test_what_is_no_conversation(ready, name, messages):
    with pytest.raises(RequestError) as caught:
        ready(FAMILIES[name][0].replace("{", "") + PLAIN, messages=messages, tools=TOOLS)
    assert caught.value.param.startswith("messages")


def test_messages_without_tools_are_those_of_the_caller(ready, tokenizer):
    history = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    text = tokenizer.decode(ready(PLAIN, messages=history).ids)
    assert text == "[user] a\n[user] b\n[assistant]"


def test_a_template_without_tools_gets_them_in_words(ready, tokenizer):
    history = [
        {"role": "user", "content": "Time?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "get-time", "arguments": "{}"},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "user", "content": "Thanks"},
    ]
    text = tokenizer.decode(ready(PLAIN, messages=history, tools=TOOLS).ids)
    first, _, rest = text.partition("\n\nTime?\n")
    lines = [json.loads(line) for line in first.splitlines() if line.startswith('{"name": "get')]
    assert lines == [tool.definition()["function"] for tool in TOOLS]
    assert rest == (
        '[assistant] {"name": "get-time", "parameters": {}}\n'
        "[user] The result of get-time:\nnoon\n\nThanks\n[assistant]"
    )


def test_tools_are_shown_only_where_they_may_be_called(ready, tokenizer):
    assert ready(PLAIN, tools=TOOLS, tool_choice="none").ids == ready(PLAIN).ids
    allowed = ToolChoice("auto", frozenset(["get-time"]))
    prompt = ready(PLAIN, tools=TOOLS, tool_choice=allowed)
    assert prompt.ids == ready(PLAIN, tools=TOOLS).ids
    assert [tool.name for tool in prompt.reply_format.tools] == ["get-time"]
    assert "get_weather" not in prompt.params.constraint.source


def test_mistrals_ids_have_nine_letters(ready, tokenizer):
    source = (
        "[TOOL_CALLS]{% for m in messages %}{{ m.tool_call_id }}|"
        "{% for c in m.tool_calls or [] %}{{ c.id }}{% endfor %}|{% endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    history = [
        {"role": "assistant", "tool_calls": [{**call, "id": "call_0123456789"}]},
        {"role": "tool", "tool_call_id": "call_0123456789", "content": ""},
        {"role": "assistant", "tool_calls": [{**call, "id": "abcdefghi"}]},
    ]
    ids = tokenizer.decode(ready(source, messages=history).ids).removeprefix("[TOOL_CALLS]")
    _, first, second, _, _, third, _ = ids.split("|")
    assert first == second
    assert len(first) == 9
    assert first.isalnum()
    assert third == "abcdefghi"


def test_phis_tools_are_a_field_of_the_system_message(ready, tokenizer):
    source = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
        "{% if m['tools'] %}<|tool|>{{ m['tools'] }}<|/tool|>{% endif %}{{ '\\n' }}{% endfor %}"
    )
    source += "{# message['tools'] #}"
    function = {"name": "get-time", "arguments": "{}"}
    history = [
        {"role": "user", "content": "Time?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    text = tokenizer.decode(ready(source, messages=history, tools=TOOLS).ids)
    system, user, call, result = text.splitlines()
    shown = system.removeprefix("[system] <|tool|>").removesuffix("<|/tool|>")
    assert json.loads(shown) == [tool.definition()["function"] for tool in TOOLS]
    assert (user, result) == ("[user] Time?", "[tool] noon")
    assert json.loads(call.removeprefix("[assistant] ")) == [{"name": "get-time", "arguments": {}}]


def test_reasoning_is_open_where_the_prompt_opens_it(ready):
    assert ready(THINKING).reply_format.thinking.open
    closed = ready(THINKING, template_kwargs={"enable_thinking": False})
    assert not closed.reply_format.thinking.open
    assert ready(THINKING, reasoning_apart=False).reply_format.thinking is None


def test_a_budget_needs_a_token_that_ends_reasoning(ready):
    with pytest.raises(RequestError) as caught:
        ready(THINKING, reasoning_budget=5)
    assert caught.value.param == "reasoning_budget"
    # A model that does not reason keeps every budget.
    assert ready(PLAIN, reasoning_budget=5).params.constraint is None


@pytest.mark.parametrize("name", ["generic", "hermes", "llama", "mistral"])
def test_formats_hold_the_answer(ready, accepts, name):
    source = FAMILIES[name][0] + PLAIN
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    constraint = ready(source, response_format=wanted).params.constraint
    assert accepts(constraint, '{"a": 1}')
    assert not accepts(constraint, '{"a": "1"}')
    assert not accepts(constraint, "Hi")
    either = ready(source, response_format=wanted, tools=TOOLS).params.constraint
    assert accepts(either, '{"a": 1}')
    assert accepts(either, FAMILIES[name][2])
    assert not accepts(either, "Hi")
    any_object = ready(source, response_format={"type": "json_object"}).params.constraint
    assert accepts(any_object, '{"b": [1, {}]}')
    assert not accepts(any_object, "[1]")
    assert ready(source, response_format={"type": "text"}).params.constraint is None


def test_formats_come_after_reasoning(ready, accepts):
    constraint = ready(THINKING, response_format={"type": "json_object"}).params.constraint
    assert accepts(constraint, 'Hm {"x"</think>\n\n{"a": 1}')
    assert not accepts(constraint, "Hm</think>\n\nHi")


def test_a_grammar_of_ones_own_comes_after_reasoning(ready, accepts):
    params = SamplingParams(constraint=Constraint("regex", "[ab]+"))
    assert ready(PLAIN, params=params).params.constraint == params.constraint
    constraint = ready(THINKING, params=params).params.constraint
    assert accepts(constraint, "Hm</think>abba")
    assert not accepts(constraint, "Hm</think>abc")
    for expression, text in (("a/b\\\\|c\nd", "c\nd"), ("a/b\\\\|c", "a/b\\"), ("", "")):
        params = SamplingParams(constraint=Constraint("regex", expression))
        assert accepts(ready(THINKING, params=params).params.constraint, f"Hm</think>{text}")
    params = SamplingParams(constraint=Constraint("gbnf", 'root ::= "a" start\nstart ::= [0-9]+'))
    assert accepts(ready(THINKING, params=params).params.constraint, "Hm</think>a17")
    with pytest.raises(RequestError):
        ready(PLAIN, params=params, response_format={"type": "json_object"})


def test_a_schema_that_cannot_be_enforced(ready, accepts):
    """Refused where it is strict; else the arguments may be any object."""
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    function = {"name": "f", "parameters": odd}
    tools = tools_from([{"type": "function", "function": function}])
    constraint = ready(PLAIN, tools=tools, tool_choice="required").params.constraint
    assert accepts(constraint, '{"name": "f", "parameters": {"b": 1}}')
    strict = {**odd, "additionalProperties": False, "required": ["a"]}
    with pytest.raises(RequestError, match="uniqueItems"):
        tools_from(
            [{"type": "function", "function": {**function, "strict": True, "parameters": strict}}]
        )
    with pytest.raises(RequestError, match="uniqueItems") as caught:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": odd}}
        ready(PLAIN, response_format=wanted)
    where = "response_format.json_schema.schema.properties.a.uniqueItems"
    assert caught.value.param == where


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"type": "xml"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}}},
            "response_format.json_schema.name",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {"type": "object"}},
            },
            "response_format.json_schema.schema",
        ),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": {**SCHEMA, "required": []}},
            },
            "response_format.json_schema.schema",
        ),
    ],
)
def test_bad_formats_are_named(ready, wanted, param):
    with pytest.raises(RequestError) as caught:
        ready(PLAIN, response_format=wanted)
    assert caught.value.param == param
