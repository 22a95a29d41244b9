"""Llama 3.1 to 3.3: the reply is one object, perhaps behind a marker.

{"name": "get_weather", "parameters": {"city": "Oslo"}}
"""

from __future__ import annotations

from collections.abc import Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar
from oxillama_torch.chat.json_reader import call_object
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Llama"]

_MARK = "<|python_tag|>"


class Llama(Family):
    name = "llama"
    others = (_MARK,)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return "<|start_header_id|>" in source and '"parameters"' in source and "tools" in source

    def read_bare(self, reader: Reader) -> Program[None]:
        while (yield from reader.attempt("", self.call(reader))):
            # What the model writes between calls, where it makes several.
            yield from reader.take_while(lambda char: char.isspace() or char in ";,")

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        yield from reader.accept(self.text(_MARK))
        yield from reader.space()
        return (yield from call_object(reader))

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        # The template refuses messages with more than one call.
        return grammar.calls(tools, '{"name": "', '", "parameters": ', "}")

    def bare_section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        return super().bare_section(grammar, tools, False)
