"""Qwen 3 Coder, Qwen 3.5, Nemotron 3, Step 3.5: arguments between tags.

<tool_call>
<function=get_weather>
<parameter=city>
Oslo
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.families.tagged_arguments import TaggedArguments, value_rule
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["QwenCoder"]

_LINE = "\n"


class QwenCoder(Family):
    name = "qwen-coder"
    trigger = "<tool_call>"
    others = ("</tool_call>",)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return "<tool_call>" in source and "<function=" in source and "<parameter=" in source

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        if not (yield from reader.accept("<function=")):
            return False
        name = yield from reader.take_while(lambda char: char not in ">\n")
        if not (yield from reader.accept(">")) or not reader.start_call(name):
            return False
        arguments = TaggedArguments(reader, reader.tools[name])
        while True:
            yield from reader.space()
            if not (yield from reader.accept("<parameter=")):
                break
            key = yield from reader.take_while(lambda char: char not in ">\n")
            yield from reader.accept(">")
            if not (yield from arguments.read(key, "</parameter>")):
                return True
        if not (yield from reader.accept("</function>")) and not (yield from reader.peek()):
            return True  # cut off
        arguments.close()
        yield from reader.space()
        yield from reader.accept(self.text("</tool_call>"))
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        choices = [self._function(grammar, tool) for tool in tools]
        end = f'"\\n</function>\\n" {self.lark("</tool_call>")}'
        call = grammar.rule("call", f'"\\n<function=" ({" | ".join(choices)}) {end}')
        return grammar.several(call, f"{literal(_LINE)} {self.lark(self.trigger)}", many)

    def _function(self, grammar: Grammar, tool: Tool) -> str:
        required = tool.schema.get("required") or []
        parts = [literal(f"{tool.name}>")]
        for key in tool.schema.get("properties") or {}:
            value = value_rule(grammar, tool, key, literal("\n</parameter>"))
            optional = "" if key in required else "?"
            parts.append(f"({literal(_LINE + f'<parameter={key}>' + _LINE)} {value}){optional}")
        return " ".join(parts)
