"""Gemma 4: calls in a notation of its own, keys bare and strings between marker tokens.

    <|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:2}<tool_call|>

Reasoning is ``<|channel>thought``, a line break, the text, ``<channel|>``. Gemma 2 and 3 know no
tools, see ``generic``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from oxillama_torch.chat.families.base import Family
from oxillama_torch.chat.grammar import Grammar, Thinking, json_rule, literal
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["Gemma"]

_BEGIN, _END, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_SCALARS = ("integer", "number", "boolean", "null")


class Gemma(Family):
    name = "gemma"
    trigger = _BEGIN
    others = (_END, _QUOTE)

    @classmethod
    def speaks(cls, source: str) -> bool:
        return _BEGIN in source and _QUOTE in source

    def reason(self, reader: Reader, thinking: Thinking) -> Program[None]:
        yield from reader.accept("thought")
        yield from super().reason(reader, thinking)

    def call(self, reader: Reader) -> Program[bool]:
        if not (yield from reader.accept("call:")):
            return False
        name = yield from reader.take_while(lambda char: char != "{")
        if (yield from reader.peek()) != "{" or not reader.start_call(name):
            return False
        yield from self._value(reader)
        yield from reader.accept(self.text(_END))
        return True

    def _value(self, reader: Reader) -> Program[bool]:
        """One value, passed on as JSON; False if it is cut off."""
        if (yield from reader.accept("{")):
            return (yield from self._items(reader, "{", "}"))
        if (yield from reader.accept("[")):
            return (yield from self._items(reader, "[", "]"))
        if (yield from reader.accept(self.text(_QUOTE))):
            reader.arguments('"')
            found = yield from reader.until(
                [self.text(_QUOTE)], lambda t: reader.arguments(_inner(t))
            )
            reader.arguments('"' if found is not None else "")
            return found is not None
        text = yield from reader.take_while(lambda char: char not in ",}]")
        if (yield from reader.peek()):
            reader.arguments(_scalar(text.strip()))
        return True

    def _items(self, reader: Reader, begin: str, end: str) -> Program[bool]:
        """What stands between brackets: values, with keys in an object."""
        reader.arguments(begin)
        first = True
        while not (yield from reader.accept(end)):
            if not first:
                if not (yield from reader.accept(",")):
                    return False
                reader.arguments(", ")
            first = False
            if begin == "{":
                key = yield from reader.take_while(lambda char: char not in ":}")
                if not (yield from reader.accept(":")):
                    return False
                reader.arguments(f"{json.dumps(key.strip(), ensure_ascii=False)}: ")
            if not (yield from self._value(reader)):
                return False
        reader.arguments(end)
        return True

    def section(self, grammar: Grammar, tools: Sequence[Tool], many: bool) -> str:
        write = _Writer(grammar, self.lark(_QUOTE))
        choices = [f"{literal(tool.name)} {write.value(tool.schema)}" for tool in tools]
        call = grammar.rule("call", f'"call:" ({" | ".join(choices)}) {self.lark(_END)}')
        return grammar.several(call, self.lark(_BEGIN), many)


class _Writer:
    """Rules for values of a schema in Gemma's notation."""

    def __init__(self, grammar: Grammar, quote: str) -> None:
        self._grammar, self._quote = grammar, quote
        lazy = "" if quote.startswith("<") else "lazy"
        self._text = grammar.rule("text_end", f"TEXT {quote}", lazy)
        grammar.rule("SCALAR", r"/-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null/")
        grammar.rule("KEY", "/[a-zA-Z_][a-zA-Z0-9_-]*/")
        pair = grammar.rule("pair", 'KEY ":" any')
        grammar.rule(
            "any",
            f'{quote} {self._text} | SCALAR | "{{" ({pair} ("," {pair})*)? "}}"'
            ' | "[" (any ("," any)*)? "]"',
        )

    def value(self, schema: Any) -> str:
        """A rule for what a schema allows; where it is not one of a few forms, for anything."""
        if not isinstance(schema, dict):
            return "any"
        kind = schema.get("type")
        if kind == "string" and isinstance(schema.get("enum"), list):
            texts = " | ".join(literal(str(text)) for text in schema["enum"])
            return f"({self._quote} ({texts}) {self._quote})"
        if kind == "string":
            return f"({self._quote} {self._text})"
        if kind in _SCALARS:
            return self._grammar.part(json_rule(schema))
        if kind == "array":
            item = self.value(schema.get("items"))
            return self._grammar.part(f'"[" ({item} ("," {item})*)? "]"')
        if kind == "object" and isinstance(schema.get("properties"), dict):
            return self._grammar.part(f'"{{" {self._pairs(schema)} "}}"')
        return "any"

    def _pairs(self, schema: dict[str, Any]) -> str:
        """Properties in the order of their names, as the template sorts them."""
        required = schema.get("required") or []
        starts: list[str] = []  # one for every property that may be the first
        must_come = False
        for key in sorted(schema["properties"]):
            pair = self._grammar.part(
                f"{literal(key + ':')} {self.value(schema['properties'][key])}"
            )
            optional = "" if key in required else "?"
            starts = [f'{start} ("," {pair}){optional}' for start in starts]
            if not must_come:
                starts.append(pair)
            must_come = must_come or key in required
        if not starts:
            return ""
        return f"({' | '.join(starts)})" + ("" if must_come else "?")


def _inner(text: str) -> str:
    """A text as it stands between the quotation marks of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _scalar(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    return text
