"""Arguments written one by one between tags, as plain text: to JSON, and the grammar of them."""

from __future__ import annotations

import json
from typing import Any

from oxillama_torch.chat.grammar import Grammar, json_rule, literal
from oxillama_torch.chat.reader import Program, Reader
from oxillama_torch.chat.tool import Tool

__all__ = ["TaggedArguments", "value_rule"]


class TaggedArguments:
    """The arguments of the call that has just begun, as the pieces of one JSON object."""

    def __init__(self, reader: Reader, tool: Tool) -> None:
        self._reader = reader
        self._properties = tool.schema.get("properties") or {}
        self._count = 0

    def read(self, key: str, end: str) -> Program[bool]:
        """One value up to the tag ``end``; False if the reply ends before."""
        held: list[str] = []
        found = yield from self._reader.until([end], held.append)
        text = "".join(held).removeprefix("\n").removesuffix("\n")
        start = "{" if self._count == 0 else ", "
        self._count += 1
        if found is None:
            # Cut off: so is the JSON.
            value = json.dumps(text, ensure_ascii=False)[:-1]
        else:
            value = self._as_json(key, text)
        self._reader.arguments(f"{start}{json.dumps(key, ensure_ascii=False)}: {value}")
        return found is not None

    def close(self) -> None:
        """There are no more arguments."""
        self._reader.arguments("{}" if self._count == 0 else "}")

    def _as_json(self, key: str, text: str) -> str:
        """A value's text, which is JSON unless the schema wants a string there."""
        if _is_string(self._properties.get(key)):
            return json.dumps(text, ensure_ascii=False)
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            # Python's spelling is what some models have learnt.
            named = {"True": "true", "False": "false", "None": "null"}
            return named.get(text.strip(), json.dumps(text, ensure_ascii=False))
        return text.strip()


def value_rule(grammar: Grammar, tool: Tool, key: str, end: str) -> str:
    """The rule of one value with the tag behind it, ``end`` as a Lark expression."""
    schema = tool.schema
    value = schema["properties"][key]
    if _is_string(value):
        if isinstance(value.get("enum"), list):
            texts = " | ".join(literal(str(text)) for text in value["enum"])
            return grammar.part(f"({texts}) {end}")
        # A tag that is a token ends the text by itself.
        return grammar.part(f"TEXT {end}", "" if end.startswith("<") else "lazy")
    definitions = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    body = json_rule({**definitions, **value} if isinstance(value, dict) else {})
    return f"{grammar.part(body)} {end}"


def _is_string(schema: Any) -> bool:
    """Whether a value is a string, and so written without quotation marks."""
    return isinstance(schema, dict) and schema.get("type") == "string"
