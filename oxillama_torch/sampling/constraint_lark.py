"""llguidance's Lark dialect: the JSON schemas within a grammar are held to the same rules."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint_schema import STYLE, prepare_schema

__all__ = ["prepare_lark"]

# Strings, expressions and comments are passed over; only what stands outside counts.
_PARTS = re.compile(
    r'"(?:\\.|[^"\\\n])*"[i]?'
    r"|/(?!/)(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n])+/[a-z]*"
    r"|//[^\n]*|\#[^\n]*"
    r"|%json(?P<json>\s*)(?=[{tf])"
    r"|(?P<other>%[a-z_]+|@\w+)"
)
#: Options that only change how JSON is laid out.
_LAYOUT = frozenset(
    {"whitespace_flexible", "whitespace_pattern", "item_separator", "key_separator"}
)
_STATEMENTS = frozenset({"%ignore", "%regex", "%llguidance"})


def prepare_lark(source: str, param: str, loads: Callable[[str], tuple[Any, int]]) -> str:
    """The grammar with its JSON schemas made exact.

    Args:
        source: the grammar.
        param: what errors call it.
        loads: parses the JSON at the beginning of a text; returns it and where it ends.

    Raises:
        RequestError: a schema that would not be enforced, or a statement that reaches beyond the
            grammar.
    """
    made, done = [], 0
    at = 0
    while (found := _PARTS.search(source, at)) is not None:
        at = found.end()
        if found["other"] and found["other"] not in _STATEMENTS:
            raise RequestError(f"{found['other']!r} is not supported", param=param)
        if found["json"] is None:
            continue
        schema, length = loads(source[at:])
        style: Mapping[str, Any] = STYLE
        if isinstance(schema, dict) and "x-guidance" in schema:
            style = _style(schema.pop("x-guidance"), param)
        made += [source[done:at], json.dumps(prepare_schema(schema, f"{param}.%json", style))]
        at = done = at + length
    return "".join([*made, source[done:]])


def _style(options: Any, param: str) -> dict[str, Any]:
    if not isinstance(options, dict) or not options.keys() <= _LAYOUT:
        known = ", ".join(sorted(_LAYOUT))
        raise RequestError(f"'x-guidance' may have: {known}", param=f"{param}.%json.x-guidance")
    return {**options, "json_allowed_escapes": STYLE["json_allowed_escapes"]}
