"""A turn to be taken: from messages, tools and formats to a prompt, a constraint and a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oxillama_torch.chat.answer import Answer, answer_of
from oxillama_torch.chat.families.base import Message
from oxillama_torch.chat.grammar import Thinking, Wish
from oxillama_torch.chat.reply import ReplyFormat
from oxillama_torch.chat.schema import is_enforceable
from oxillama_torch.chat.syntax import Syntax, syntax_of
from oxillama_torch.chat.tool import Tool, ToolChoice
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.chat_template import ChatTemplate
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Ask", "Prompt", "prepare", "prepare_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one assistant turn is asked to be.

    Args:
        messages: as chat templates know them (system, user, assistant, tool).
        params: sampling parameters; ``n`` choices.
        tools: what the model may call.
        tool_choice: ``none``, ``auto``, ``required``, or ``=NAME`` for one function; anything that
            ``ToolChoice.of`` takes.
        parallel_tool_calls: whether one turn may make several calls. A named function is called
            once.
        response_format: the chat route's object (``json_schema``, ``json_object`` or ``text``).
        template_kwargs: variables for the chat template.
        reasoning_budget: most tokens of reasoning; None: no limit.
        reasoning_apart: whether reasoning is told apart from the answer.
    """

    messages: Sequence[Message]
    params: SamplingParams
    tools: tuple[Tool, ...] = ()
    tool_choice: str | Mapping[str, Any] | ToolChoice = "auto"
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
    _check_messages(ask.messages)
    syntax = syntax_of(template, tokenizer)
    choice = ask.tool_choice
    if not isinstance(choice, ToolChoice):
        choice = ToolChoice.of(choice, ask.tools)
    callable_tools = choice.pick(ask.tools)
    shown = ask.tools if callable_tools else ()
    messages, definitions = syntax.family.messages(ask.messages, shown)
    ids = template.render_ids(messages, tools=definitions, **(ask.template_kwargs or {}))
    thinking = syntax.thinking(ids, tokenizer, ask.reasoning_budget)
    constraint = _constraint(ask, syntax, callable_tools, choice, thinking)
    return Prompt(
        ids,
        replace(ask.params, constraint=constraint),
        ReplyFormat(syntax.family, thinking if ask.reasoning_apart else None, callable_tools),
    )


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise RequestError("a conversation has at least one message", param="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("a message is an object with a role", param=f"messages[{i}]")


def prepare_all(
    conversations: Sequence[Sequence[Message]],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    **fields: Any,
) -> list[Prompt]:
    """Several conversations; ``fields`` are those of Ask but the messages."""
    asks = (Ask(messages=messages, **fields) for messages in conversations)
    return [prepare(ask, template, tokenizer) for ask in asks]


def _constraint(
    ask: Ask,
    syntax: Syntax,
    tools: tuple[Tool, ...],
    choice: ToolChoice,
    thinking: Thinking | None,
) -> Constraint | None:
    """What the reply is held to: calls, a format, the end of reasoning, or nothing."""
    answer = answer_of(ask.response_format, ask.params.constraint)
    limited = thinking is not None and thinking.budget is not None
    if limited and thinking.end.token_id is None:
        raise RequestError(
            "a budget needs a token that ends the reasoning; this model has none",
            param="reasoning_budget",
        )
    if not tools and not limited and (answer is None or _is_all(answer, syntax, thinking)):
        return None if answer is None else answer.constraint
    if answer is not None and not answer.can_be_part:
        raise RequestError(
            "a Lark grammar has to be that of the whole reply, without tools or reasoning",
            param=answer.constraint.param,
        )
    wish = Wish(
        tools=[_enforceable(tool) for tool in tools],
        must_call=choice.mode == "required",
        many=ask.parallel_tool_calls and not choice.once,
        answer=None if answer is None else answer.body(),
        thinking=thinking,
    )
    param = "tools" if tools else "reasoning_budget" if answer is None else answer.constraint.param
    return Constraint("lark", syntax.family.grammar(wish), param)


def _is_all(answer: Answer, syntax: Syntax, thinking: Thinking | None) -> bool:
    """Whether the answer is all that the model writes."""
    if thinking is None:
        return not syntax.family.markers(False)
    return not answer.can_be_part and not thinking.open


def _enforceable(tool: Tool) -> Tool:
    """The tool with a schema that can be enforced: where it is not strict, any object may do."""
    if tool.strict or is_enforceable(tool.schema):
        return tool
    return replace(tool, parameters=None)
