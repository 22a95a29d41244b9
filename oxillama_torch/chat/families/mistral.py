"""Mistral: a list of calls behind the marker, or, from 2025 on, name and arguments of each.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "Xk2fT9aLq"}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}
[TOOL_CALLS]get_weather[CALL_ID]Xk2fT9aLq[ARGS]{"city": "Oslo"}
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Sequence
from typing import Any

from oxillama_torch.chat.families.base import Family, Message
from oxillama_torch.chat.grammar import Grammar, literal
from oxillama_torch.chat.json_reader import call_list, json_value
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Mistral"]

_ALPHABET = string.ascii_letters + string.digits
_ID = re.compile(r"[a-zA-Z0-9]{9}")


def _new_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


class Mistral(Family):
    name = "mistral"
    trigger = "[TOOL_CALLS]"
    others = ("[ARGS]", "[CALL_ID]")
    new_id = staticmethod(_new_id)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return cls.trigger in source

    def messages(
        self, messages: Sequence[Message], tools: Sequence[Tool]
    ) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Ids of calls become nine letters and digits: the templates refuse any other."""
        return super().messages([_with_short_ids(message) for message in messages], tools)

    def call(self, reader: Reader) -> Program[bool]:
        yield from reader.space()
        if (yield from reader.peek()) == "[":
            return (yield from call_list(reader))
        name = yield from reader.take_while(lambda char: char.isalnum() or char in "_-.")
        call_id = None
        if (yield from reader.accept(self.text("[CALL_ID]"))):
            call_id = yield from reader.take_while(str.isalnum)
        yield from reader.accept(self.text("[ARGS]"))
        yield from reader.space()
        if (yield from reader.peek()) != "{" or not reader.start_call(name, call_id):
            return False
        yield from json_value(reader, reader.arguments)
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        if "[ARGS]" not in self.source:
            grammar.rule("ID", r'/(, "id": "[a-zA-Z0-9]{9}")?\}/')
            call = grammar.calls(tools, '{"name": "', '", "arguments": ', "")
            call = grammar.rule("call", f"{call} ID")
            return f'"[" {grammar.several(call, literal(", "), many)} "]"'
        has_id = "[CALL_ID]" in self.source
        call_id = f"{self.lark('[CALL_ID]')} /[a-zA-Z0-9]{{9}}/" if has_id else ""
        choices = [
            f'"{tool.name}" {call_id} {self.lark("[ARGS]")} {grammar.arguments(tool)}'
            for tool in tools
        ]
        call = grammar.rule("call", " | ".join(choices))
        return grammar.several(call, self.lark(self.trigger), many)


def _with_short_ids(message: Message) -> Message:
    message = dict(message)
    if isinstance(message.get("tool_call_id"), str):
        message["tool_call_id"] = _short(message["tool_call_id"])
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "id": _short(str(call.get("id", "")))} for call in message["tool_calls"]
        ]
    return message


def _short(call_id: str) -> str:
    if _ID.fullmatch(call_id):
        return call_id
    digest = hashlib.sha256(call_id.encode()).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:9])
