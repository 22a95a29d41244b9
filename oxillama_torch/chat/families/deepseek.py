"""DeepSeek V3, R1 and V3.1, with fullwidth bars and lower blocks in their markers.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Oslo"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>                                        V3, R1

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Oslo"}
<｜tool▁call▁end｜><｜tool▁calls▁end｜>                        V3.1, without the line break
"""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.json_reader import json_value
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["DeepSeek"]

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeek(Family):
    name = "deepseek"
    trigger = _CALLS
    others = (_CALLS_END, _CALL, _CALL_END, _SEPARATOR)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return _CALLS in source

    def call(self, reader: Reader) -> Program[bool]:
        before = reader.calls
        while True:
            yield from reader.space()
            if not (yield from reader.accept(self.text(_CALL))):
                break
            if not (yield from self._one(reader)):
                break
            yield from reader.space()
            yield from reader.accept(self.text(_CALL_END))
        yield from reader.accept(self.text(_CALLS_END))
        return reader.calls > before

    def _one(self, reader: Reader) -> Program[bool]:
        held: list[str] = []
        if (yield from reader.until([self.text(_SEPARATOR)], held.append)) is None:
            return False
        name = "".join(held).strip()
        fenced = name == "function"
        if fenced:
            name = yield from reader.take_while(lambda char: not char.isspace())
            yield from reader.space()
            fenced = yield from reader.accept("```json")
        yield from reader.space()
        if (yield from reader.peek()) != "{" or not reader.start_call(name):
            return False
        yield from json_value(reader, reader.arguments)
        yield from reader.space()
        if fenced:
            yield from reader.accept("```")
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        fenced = "```json" in self.source
        choices = [
            f'"function" {self.lark(_SEPARATOR)} {literal(tool.name + _FENCE)}'
            f' {grammar.arguments(tool)} "\\n```"'
            if fenced
            else f"{literal(tool.name)} {self.lark(_SEPARATOR)} {grammar.arguments(tool)}"
            for tool in tools
        ]
        body = grammar.rule("body", " | ".join(choices))
        call = grammar.rule("call", f"{self.lark(_CALL)} {body} {self.lark(_CALL_END)}")
        between = literal("\n") if fenced else ""
        return f"{grammar.several(call, between, many)} {self.lark(_CALLS_END)}"


_FENCE = "\n```json\n"
