"""Command R: a list of calls between markers, or, in the first one, in a fence.

<|START_ACTION|>[
    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Oslo"}}
]<|END_ACTION|>
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.json_reader import call_list
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["CommandR"]

_BEGIN, _END = "<|START_ACTION|>", "<|END_ACTION|>"


class CommandR(Family):
    name = "command-r"
    trigger = _BEGIN
    others = (_END,)
    silent = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")

    def __init__(self, source: str, special_id: Callable[[str], int | None]) -> None:
        super().__init__(source, special_id)
        self._fenced = _BEGIN not in source
        if self._fenced:
            self.trigger, self.others = "Action:", ()
        self.silent = tuple(s for s in self.silent if special_id(s) is not None and s in source)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return _BEGIN in source or "Action:" in source and "```json" in source

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        if self._fenced:
            yield from reader.accept("```json")
            yield from reader.space()
        if not (yield from call_list(reader)):
            return False
        yield from reader.space()
        yield from reader.accept("```" if self._fenced else self.text(_END))
        return True

    def wrap(self, answer: str) -> str:
        if len(self.silent) < 2:
            return answer
        begin, end = (self.lark(spelling) for spelling in self.silent[:2])
        return f"({begin} {answer} {end}?)" if answer != "TEXT" else f"({begin} TEXT {end}?)?"

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        if self._fenced:
            body = grammar.calls(tools, '{"tool_name": "', '", "parameters": ', "}")
            call = grammar.rule("call", body)
        else:
            body = grammar.calls(tools, '", "tool_name": "', '", "parameters": ', "}")
            call = grammar.rule("call", f'"{{\\"tool_call_id\\": \\"" /[0-9]{{1,2}}/ {body}')
        calls = grammar.several(call, literal("," + _LINE), many)
        calls = f"{literal('[' + _LINE)} {calls} {literal(_CLOSE)}"
        if self._fenced:
            return f'"\\n```json\\n" {calls} "\\n```"'
        return f"{calls} {self.lark(_END)}"


_LINE, _CLOSE = "\n    ", "\n]"
