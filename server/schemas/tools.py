"""How a body's ``tools`` are described; ``chat.tool.tools_from`` is what checks them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

__all__ = ["Tools"]

_PARAMETERS = {
    "type": "object",
    "properties": {"type": {"const": "object"}, "properties": {"type": "object"}},
}
_FUNCTION = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
        "description": {"type": ["string", "null"]},
        "parameters": {"anyOf": [_PARAMETERS, {"type": "null"}]},
        "strict": {"type": ["boolean", "null"]},
    },
}
_TYPE = {"const": "function"}
_NESTED = {
    "type": "object",
    "required": ["function"],
    "properties": {"type": _TYPE, "function": _FUNCTION},
}
_FLAT = {
    **_FUNCTION,
    "properties": {**_FUNCTION["properties"], "type": _TYPE, "function": False},
}

Tools = Annotated[
    list[Any],
    WithJsonSchema({"type": "array", "maxItems": 128, "items": {"anyOf": [_NESTED, _FLAT]}}),
]
