"""Families that write a JSON list of calls behind a marker.

<|tool_call|>[{"name": "get_weather", "arguments": {}}]<|/tool_call|>     Phi 4
<|tool_call|>[{"name": "get_weather", "arguments": {}}]                   Granite 3
functools[{"name": "get_weather", "arguments": {}}]                       FireFunction
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.json_reader import call_list, call_object
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Lists"]

_PAIRS = {
    "<|tool_call|>": "<|/tool_call|>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<tool_calls>": "</tool_calls>",
    "functools": "",
}


class Lists(Family):
    name = "lists"

    def __init__(self, source: str, special_id: Callable[[str], int | None]) -> None:
        super().__init__(source, special_id)
        self.trigger = next(begin for begin in _PAIRS if begin in source)
        end = _PAIRS[self.trigger]
        # Granite opens with Phi's marker, and does not close.
        self._end = end if end in source or special_id(end) is not None else ""
        self.others = (self._end,)
        # Its template breaks the line behind the marker, where others open a list.
        self._in_lines = f"{self.trigger}\\n{{" in source

    @classmethod
    def speaks(cls, source: str) -> bool:
        return any(begin in source for begin in _PAIRS)

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        before = reader.calls
        if (yield from reader.peek()) == "[":
            yield from call_list(reader)
        else:
            while (yield from call_object(reader)):
                yield from reader.space()
        if reader.calls == before:
            return False
        yield from reader.space()
        if self._end:
            yield from reader.accept(self.text(self._end))
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        call = grammar.rule("call", grammar.calls(tools, '{"name": "', '", "arguments": ', "}"))
        if self._in_lines:
            line = literal("\n")
            return f"{line} {grammar.several(call, line, many)} {line} {self.lark(self._end)}"
        calls = grammar.several(call, literal(", "), many)
        return f'"[" {calls} "]" {self.lark(self._end) if self._end else ""}'
