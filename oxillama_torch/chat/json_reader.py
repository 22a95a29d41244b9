"""JSON in a reply: values passed on as they come, and objects that are tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable

from oxillama_torch.chat.markers import OPEN
from oxillama_torch.chat.reader import Program, Reader

__all__ = ["call_list", "call_object", "json_value"]

_NAME = ("name", "tool_name")
_ARGUMENTS = ("arguments", "parameters")
#: Keys of objects that are calls. Any other, before the name, and the object is an answer.
_KEYS = frozenset([*_NAME, *_ARGUMENTS, "id", "tool_call_id", "type", "function"])


def json_value(reader: Reader, emit: Callable[[str], None]) -> Program[bool]:
    """Pass one JSON value on as it comes; False if it is cut off, or no value comes next.

    Only its extent is read: brackets, and strings with their escapes.
    """
    depth, in_string, escaped, begun = 0, False, False, False
    while chunk := (yield from reader.chunk()):
        for i, char in enumerate(chunk):
            if in_string:
                ends = char == '"' and not escaped
                escaped = char == "\\" and not escaped
                in_string, ends = not ends, ends and depth == 0
            elif char in "{[":
                depth, ends = depth + 1, False
            elif char in "}]":
                if depth == 0:
                    return _leave(reader, emit, chunk[:i], begun)
                depth -= 1
                ends = depth == 0
            elif char == '"':
                if depth == 0 and begun:
                    return _leave(reader, emit, chunk[:i], begun)
                in_string, ends = True, False
            elif char == OPEN or (depth == 0 and (char in ",:" or char.isspace())):
                return _leave(reader, emit, chunk[:i], begun and depth == 0)
            else:
                ends = False
            begun = True
            if ends:
                return _leave(reader, emit, chunk[: i + 1], True)
            if char == OPEN:
                return _leave(reader, emit, chunk[:i], False)
        _leave(reader, emit, chunk, True)
    return begun and depth == 0 and not in_string


def _leave(reader: Reader, emit: Callable[[str], None], read: str, whole: bool) -> bool:
    emit(read)
    reader.skip(len(read))
    return whole


def call_object(reader: Reader) -> Program[bool]:
    """An object ``{"name": ..., "arguments": {...}}`` in the spellings that are in use.

    An id in it is passed over: most models count from 0 in every reply.

    Returns: whether it was a call, if perhaps one that is cut off.
    """
    before = reader.calls
    if not (yield from reader.accept("{")):
        return False
    call = _Call(reader)
    while True:
        yield from reader.space()
        key = yield from _string(reader)
        if key is None or (key not in _KEYS and reader.calls == before):
            break
        yield from reader.space()
        if not (yield from reader.accept(":")):
            break
        yield from reader.space()
        if not (yield from call.field(key)):
            break
        yield from reader.space()
        if not (yield from reader.accept(",")):
            if (yield from reader.accept("}")):
                call.close()
            break
    return reader.calls > before


class _Call:
    """The fields of one call object, in whatever order they come."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._name: str | None = None
        self._arguments: str | None = None
        self._started = False

    def field(self, key: str) -> Program[bool]:
        """Read one value; False if it is no part of a call."""
        reader = self._reader
        if key == "function" and (yield from reader.peek()) == "{":
            self._started = yield from call_object(reader)
            return self._started
        if key in _ARGUMENTS and not self._started:
            return (yield from self._read_arguments())
        held: list[str] = []
        if not (yield from json_value(reader, held.append)):
            return False
        value = _loads("".join(held))
        if key in (*_NAME, "function") and not self._started:
            if not isinstance(value, str) or value not in reader.tools:
                return False
            self._name = value
            if self._arguments is not None:
                self._start(self._arguments)
        return True

    def close(self) -> None:
        """The object ends: a call without arguments has an empty object of them."""
        if self._name is not None and not self._started:
            self._start("{}")

    def _read_arguments(self) -> Program[bool]:
        """An object, passed on at once where the name is known; or one written as a string."""
        reader = self._reader
        if (yield from reader.peek()) == "{" and self._name is not None:
            self._start("")
            return (yield from json_value(reader, reader.arguments))
        held: list[str] = []
        if not (yield from json_value(reader, held.append)):
            return False
        text = "".join(held)
        if not text.startswith("{"):
            value = _loads(text)
            text = "{}" if text in ("null", '""') else value if isinstance(value, str) else ""
            if not isinstance(_loads(text), dict):
                return False
        if self._name is None:
            self._arguments = text
        else:
            self._start(text)
        return True

    def _start(self, arguments: str) -> None:
        self._started = self._reader.start_call(self._name)
        self._reader.arguments(arguments)


def call_list(reader: Reader) -> Program[bool]:
    """Call objects between ``[`` and ``]``; True if the first of them is one."""
    before = reader.calls
    if not (yield from reader.accept("[")):
        return False
    while True:
        yield from reader.space()
        if not (yield from call_object(reader)):
            break
        yield from reader.space()
        if not (yield from reader.accept(",")):
            yield from reader.accept("]")
            break
    return reader.calls > before


def _string(reader: Reader) -> Program[str | None]:
    """A JSON string, decoded; None if something else comes."""
    if (yield from reader.peek()) != '"':
        return None
    held: list[str] = []
    if not (yield from json_value(reader, held.append)):
        return None
    value = _loads("".join(held))
    return value if isinstance(value, str) else None


def _loads(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
