"""Hermes, Qwen 2.5 and 3, Granite 4 and many that talk ChatML.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Oslo"}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.json_reader import call_object
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Hermes"]

_LINE = "\n"


class Hermes(Family):
    name = "hermes"
    trigger = "<tool_call>"
    others = ("</tool_call>",)

    @classmethod
    def speaks(cls, source: str) -> bool:
        # Others have the marker too, with XML behind it, or only in what they tell the model.
        return "<tool_call>" in source and not ("<invoke" in source or "<tool_calls>" in source)

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        if not (yield from call_object(reader)):
            return False
        yield from reader.space()
        yield from reader.accept(self.text("</tool_call>"))
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        body = grammar.calls(tools, '\n{"name": "', '", "arguments": ', "}\n")
        call = grammar.rule("call", f"{body} {self.lark('</tool_call>')}")
        return grammar.several(call, f"{literal(_LINE)} {self.lark(self.trigger)}", many)
