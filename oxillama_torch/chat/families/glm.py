"""GLM 4.5 and later: the name, then keys and values between tags.

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Oslo</arg_value>
</tool_call>
"""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.families.tagged_arguments import TaggedArguments, value_rule
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Glm"]

_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"


class Glm(Family):
    name = "glm"
    trigger = "<tool_call>"
    others = ("</tool_call>", _KEY, _KEY_END, _VALUE, _VALUE_END)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return "<tool_call>" in source and _KEY in source

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        name = yield from reader.take_while(lambda char: char.isalnum() or char in "_-")
        yield from reader.space()
        if (yield from reader.peek()) in ("", "{") or not reader.start_call(name):
            return False
        arguments = TaggedArguments(reader, reader.tools[name])
        while (yield from reader.accept(self.text(_KEY))):
            held: list[str] = []
            yield from reader.until([self.text(_KEY_END)], held.append)
            yield from reader.space()
            yield from reader.accept(self.text(_VALUE))
            if not (yield from arguments.read("".join(held), self.text(_VALUE_END))):
                return True
            yield from reader.space()
        arguments.close()
        yield from reader.accept(self.text("</tool_call>"))
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        # Later ones leave the line breaks out.
        grammar.rule("LINE", r"/\n?/")
        choices = " | ".join(self._call(grammar, tool) for tool in tools)
        call = grammar.rule("call", f"({choices}) {self.lark('</tool_call>')}")
        return grammar.several(call, f"LINE {self.lark(self.trigger)}", many)

    def _call(self, grammar: Grammar, tool: Tool) -> str:
        required = tool.schema.get("required") or []
        parts = [f"{literal(tool.name)} LINE"]
        for key in tool.schema.get("properties") or {}:
            value = value_rule(grammar, tool, key, self.lark(_VALUE_END))
            head = f"{self.lark(_KEY)} {literal(key)} {self.lark(_KEY_END)} LINE"
            optional = "" if key in required else "?"
            parts.append(f"({head} {self.lark(_VALUE)} {value} LINE){optional}")
        return " ".join(parts)
