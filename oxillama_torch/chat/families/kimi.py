"""Kimi K2: name, number and arguments between markers.

    <|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0
    <|tool_call_argument_begin|>{"city": "Oslo"}<|tool_call_end|><|tool_calls_section_end|>

without the line break.
"""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.json_reader import json_value
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Kimi"]

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"


class Kimi(Family):
    name = "kimi"
    trigger = _SECTION
    others = (_SECTION_END, _CALL, _CALL_END, _ARGUMENTS)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return _SECTION in source

    def call(self, reader: Reader) -> Program[bool]:
        before = reader.calls
        while True:
            yield from reader.space()
            if not (yield from reader.accept(self.text(_CALL))):
                break
            held: list[str] = []
            if (yield from reader.until([self.text(_ARGUMENTS)], held.append)) is None:
                break
            # The id is the model's own: its template refers to calls by it.
            call_id = "".join(held).strip()
            name = call_id.removeprefix("functions.").rpartition(":")[0]
            if not reader.start_call(name or call_id, call_id if name else None):
                break
            yield from reader.space()
            yield from json_value(reader, reader.arguments)
            yield from reader.space()
            yield from reader.accept(self.text(_CALL_END))
        yield from reader.accept(self.text(_SECTION_END))
        return reader.calls > before

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        choices = [
            f"{literal(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {self.lark(_ARGUMENTS)}"
            f" {grammar.arguments(tool)}"
            for tool in tools
        ]
        body = grammar.rule("body", " | ".join(choices))
        call = grammar.rule("call", f"{self.lark(_CALL)} {body} {self.lark(_CALL_END)}")
        return f"{grammar.several(call, '', many)} {self.lark(_SECTION_END)}"
