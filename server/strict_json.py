"""JSON as strict as its definition allows, at the speed of a fast parser.

Refused beside what is no JSON: an object that has a key twice (readers differ in which one they
take), nesting deeper than ``MAX_DEPTH``, more than ``MAX_CONTAINERS`` objects and arrays,
``MAX_KEYS`` keys or ``MAX_VALUES`` values (making and checking them holds up every thread), numbers
that are not finite, bytes that are not UTF-8, lone surrogates.
What the parser does not look at is counted outside of the strings, by functions that run at memory
speed.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from oxillama_torch.errors import RequestError

__all__ = ["MAX_CONTAINERS", "MAX_DEPTH", "MAX_KEYS", "MAX_VALUES", "loads"]

MAX_DEPTH = 64
MAX_CONTAINERS = 20_000
MAX_KEYS = 50_000
MAX_VALUES = 400_000


def loads(raw: bytes) -> Any:
    """Parse a JSON document.

    Raises:
        RequestError: it is none, or one of those above.
    """
    outside = _without_strings(raw)
    keys, objects = outside.count(b":"), outside.count(b"{")
    containers = objects + outside.count(b"[")
    if containers > MAX_CONTAINERS:
        raise _refused(f"the body has more than {MAX_CONTAINERS} objects and arrays")
    if keys > MAX_KEYS:
        raise _refused(f"the body has more than {MAX_KEYS} keys")
    if outside.count(b",") >= MAX_VALUES:
        raise _refused(f"the body has more than {MAX_VALUES} values")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _refused(f"the body is not valid JSON ({where})") from None
    if containers > MAX_DEPTH and _depth(outside) > MAX_DEPTH:
        raise _refused(f"the body is nested deeper than {MAX_DEPTH} levels")
    if objects and _count_keys(value, objects) != keys:
        raise _refused(f"the body has the key {_repeated(raw)!r} twice in one object")
    return value


def _without_strings(raw: bytes) -> bytes:
    """A document without the contents of its strings; of one that is not valid, any bytes.

    Raises:
        RequestError: more strings than there may be keys and values.
    """
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if raw.count(b'"') > 2 * (MAX_KEYS + MAX_VALUES):
        raise _refused(f"the body has more than {MAX_KEYS} keys and {MAX_VALUES} values")
    return b"".join(raw.split(b'"')[::2])


def _depth(outside: bytes) -> int:
    deepest = depth = 0
    for byte in outside.translate(None, b" \t\r\n,:0123456789.+-eEtrufalsn"):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    return deepest


def _count_keys(value: Any, objects: int) -> int:
    """Keys of all objects in a value; looks no further once it has met as many as were written."""
    keys, pending = 0, [value]
    while pending and objects:
        item = pending.pop()
        if type(item) is dict:
            objects -= 1
            keys += len(item)
            pending += item.values()
        elif type(item) is list:
            pending += item
    return keys


class _Repeated(Exception):  # noqa: N818 (carries a key out of the parser)
    pass


def _repeated(raw: bytes) -> str:
    """The first key that an object has twice."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(key)
            seen.add(key)

    try:
        json.loads(raw, object_pairs_hook=check)
    except _Repeated as found:
        return str(found)
    raise AssertionError("two ways of counting keys disagree")


def _refused(message: str) -> RequestError:
    return RequestError(message, code="invalid_json")
