"""A turn to be taken: from messages, tools and formats to a prompt, a constraint and a reader."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oxillama_torch.chat.families.base import Message
from oxillama_torch.chat.grammar import Thinking, Wish, json_rule
from oxillama_torch.chat.reply import ReplyFormat
from oxillama_torch.chat.schema import check_enforceable, check_strict, is_enforceable
from oxillama_torch.chat.syntax import Syntax, syntax_of
from oxillama_torch.chat.tool import Tool, ToolChoice
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_grammar import to_grammar
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.chat_template import ChatTemplate
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Ask", "Prompt", "prepare"]

_ANSWER = "answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one assistant turn is asked to be.

    Args:
        messages: as chat templates know them (system, user, assistant, tool).
        params: sampling parameters; ``n`` choices.
        tools: what the model may call.
        tool_choice: ``none``, ``auto``, ``required``, or ``=NAME`` for one function; or a
            ToolChoice.
        parallel_tool_calls: whether one turn may make several calls.
        response_format: the chat route's object (``json_schema``, ``json_object`` or ``text``).
        template_kwargs: variables for the chat template.
        reasoning_budget: most tokens of reasoning; None: no limit.
        reasoning_apart: whether reasoning is told apart from the answer.
    """

    messages: Sequence[Message]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: str | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: Mapping[str, Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    reasoning_budget: int | None = None
    reasoning_apart: bool = True


@dataclass(frozen=True, slots=True)
class Prompt:
    """A turn that can be submitted.

    Args:
        ids: the prompt.
        params: as asked for, with the constraint that the turn needs.
        reply_format: how the reply is read.
    """

    ids: list[int]
    params: SamplingParams
    reply_format: ReplyFormat


def prepare(ask: Ask, template: ChatTemplate, tokenizer: Tokenizer) -> Prompt:
    """Render a turn and find out how its reply is constrained and read.

    Raises:
        RequestError: messages, tools or formats that cannot be served.
        CapacityError: too many renderings at once.
    """
    syntax = syntax_of(template, tokenizer)
    choice = ask.tool_choice
    if not isinstance(choice, ToolChoice):
        choice = ToolChoice.of(choice, ask.tools)
    callable_tools = choice.pick(ask.tools)
    shown = ask.tools if callable_tools else ()
    messages, definitions = syntax.family.messages(ask.messages, shown)
    ids = template.render_ids(messages, tools=definitions, **(ask.template_kwargs or {}))
    thinking = syntax.thinking(ids, tokenizer, ask.reasoning_budget)
    constraint = _constraint(ask, syntax, callable_tools, choice.mode == "required", thinking)
    return Prompt(
        ids,
        replace(ask.params, constraint=constraint),
        ReplyFormat(syntax.family, thinking if ask.reasoning_apart else None, callable_tools),
    )


def _constraint(
    ask: Ask, syntax: Syntax, tools: tuple[Tool, ...], must_call: bool, thinking: Thinking | None
) -> Constraint | None:
    """What the reply is held to: calls, a format, the end of reasoning, or nothing."""
    answer = _answer(ask)
    if thinking is not None and thinking.budget is not None and thinking.end.token_id is None:
        raise RequestError(
            "a budget needs a token that ends the reasoning; this model has none",
            param="reasoning_budget",
        )
    limited = thinking is not None and thinking.budget is not None
    if not tools and not limited and (answer is None or _alone(syntax, thinking)):
        return answer
    wish = Wish(
        tools=[_enforceable(tool) for tool in tools],
        must_call=must_call,
        many=ask.parallel_tool_calls,
        answer=None if answer is None else f"@{_ANSWER}",
        thinking=thinking,
    )
    grammar = syntax.family.grammar(wish)
    param = "tools" if tools else "reasoning_budget" if answer is None else answer.param
    return Constraint("lark", grammar if answer is None else _with(grammar, answer), param)


def _alone(syntax: Syntax, thinking: Thinking | None) -> bool:
    """Whether the answer is all that the model writes."""
    return thinking is None and not syntax.family.markers(False)


def _with(grammar: str, answer: Constraint) -> str:
    """The grammar of a reply together with that of its answer, in llguidance's JSON form."""
    part = to_grammar(answer)
    parts = json.loads(part)["grammars"] if part.startswith("{") else [{"lark_grammar": part}]
    parts[0]["name"] = _ANSWER
    return json.dumps({"grammars": [{"lark_grammar": grammar}, *parts]})


def _enforceable(tool: Tool) -> Tool:
    """The tool with a schema that can be enforced: where it is not strict, any object may do."""
    if tool.strict or is_enforceable(tool.schema):
        return tool
    return replace(tool, parameters=None)


def _answer(ask: Ask) -> Constraint | None:
    """What the answer itself has to be, by ``response_format`` or by the parameters."""
    wanted, param = ask.response_format, "response_format"
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if wanted is None or kind == "text":
        return ask.params.constraint
    if ask.params.constraint is not None:
        raise RequestError("one constraint at a time: this and a grammar", param=param)
    if kind == "json_object":
        return Constraint("lark", f"start: {json_rule({'type': 'object'})}\n", param)
    if kind != "json_schema":
        raise RequestError("the type is text, json_object or json_schema", param=f"{param}.type")
    return _schema(wanted.get("json_schema"), f"{param}.json_schema")


def _schema(wanted: Any, param: str) -> Constraint:
    if not isinstance(wanted, Mapping):
        raise RequestError("an object with name and schema", param=param, code="invalid_type")
    schema, strict = wanted.get("schema"), wanted.get("strict") is True
    name = wanted.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError("a name is wanted", param=f"{param}.name")
    if schema is None:
        schema = {"type": "object"}
    if not isinstance(schema, Mapping):
        raise RequestError("a JSON schema is an object", param=f"{param}.schema")
    if strict:
        check_strict(schema, f"{param}.schema")
    check_enforceable(schema, f"{param}.schema")
    return Constraint("lark", f"start: {json_rule(dict(schema))}\n", f"{param}.schema")
