"""Grammars for replies with tool calls, in llguidance's Lark dialect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from oxillama_torch.chat.markers import Marker
from oxillama_torch.chat.tool import Tool

__all__ = ["JSON_STYLE", "Grammar", "Thinking", "Wish", "json_rule", "literal"]

#: JSON as models are taught to write it: on one line, a space at most behind comma and colon. With
#: free white space, a small model may write nothing else.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a reply's reasoning is marked.

    Args:
        begin, end: its markers.
        open: the prompt has opened it already.
        budget: most tokens of it; None: no limit.
    """

    begin: Marker
    end: Marker
    open: bool
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What a reply has to be.

    Args:
        tools: what may be called; none: no calls.
        must_call: the reply is one or more calls.
        many: more than one call may be made.
        answer: the answer as the body of a Lark rule; None: any text.
        thinking: None where the model does not reason.
    """

    tools: Sequence[Tool] = ()
    must_call: bool = False
    many: bool = True
    answer: str | None = None
    thinking: Thinking | None = None


def literal(text: str) -> str:
    """A text as a Lark string."""
    return json.dumps(text, ensure_ascii=False)


class Grammar:
    """Rules that are being collected; ``TEXT`` is any text without special tokens."""

    def __init__(self) -> None:
        self._rules = {"TEXT": r"/(.|\n)*/", "GAP": r"/[ \t\r\n]{0,4}/"}
        self._heads: dict[str, str] = {}

    def rule(self, name: str, body: str, options: str = "") -> str:
        """Add a rule; return its name."""
        self._rules[name] = body
        self._heads[name] = f"{name}[{options}]" if options else name
        return name

    def part(self, body: str, options: str = "") -> str:
        """Add a rule whose name does not matter; return the name."""
        return self.rule(f"part{len(self._rules)}", body, options)

    def arguments(self, tool: Tool) -> str:
        """The rule of a tool's arguments, written as JSON."""
        return self.part(json_rule(tool.schema))

    def calls(self, tools: Sequence[Tool], before: str, between: str, after: str) -> str:
        """One call of one of the tools: its name between the first two texts, then arguments."""
        choices = [
            f"{literal(before + tool.name + between)} {self.arguments(tool)}"
            f"{' ' + literal(after) if after else ''}"
            for tool in tools
        ]
        return "(" + " | ".join(choices) + ")"

    def call_objects(self, tools: Sequence[Tool], arguments: str) -> str:
        """One call as a JSON object, with the style of JSON that an answer has.

        Beside an answer that is JSON as well, a call must not be spelled out: llguidance reads
        text and JSON differently, and would settle for one of them at the first bracket.
        """
        return self.rule("object", " | ".join(_object_rule(tool, arguments) for tool in tools))

    @staticmethod
    def several(call: str, between: str, many: bool) -> str:
        """One call, or as many as the model likes."""
        return f"{call} ({between} {call})*" if many else call

    def thinking(self, thinking: Thinking | None) -> str:
        """The reasoning before the answer; empty where there is none."""
        if thinking is None:
            return ""
        budget = f"max_tokens={thinking.budget}" if thinking.budget is not None else ""
        if thinking.end.token_id is None:
            inside = self.rule("think", f"TEXT {thinking.end.lark}", "lazy")
        elif thinking.budget == 0:
            inside = thinking.end.lark
        else:
            inside = f"{self.rule('think', 'TEXT', budget)} {thinking.end.lark}"
        return inside if thinking.open else f"({thinking.begin.lark} {inside})?"

    def source(self, start: str) -> str:
        """The whole grammar."""
        rules = [f"{self._heads.get(name, name)}: {body}" for name, body in self._rules.items()]
        return "\n".join(["%llguidance {}", f"start: {start}", *rules, ""])


def json_rule(schema: dict) -> str:
    """The texts of a JSON schema, as the body of a rule."""
    return "%json " + json.dumps({"x-guidance": JSON_STYLE, **schema})


def _object_rule(tool: Tool, arguments: str) -> str:
    definitions = {k: v for k, v in tool.schema.items() if k in ("$defs", "definitions")}
    rest = {k: v for k, v in tool.schema.items() if k not in definitions}
    return json_rule(
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, arguments: rest},
            "required": ["name", arguments],
            "additionalProperties": False,
            **definitions,
        }
    )
