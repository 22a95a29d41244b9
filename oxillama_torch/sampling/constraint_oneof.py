"""When no value can match two schemas: then ``oneOf`` means the same as ``anyOf``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["all_apart"]

_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})
_MAX_DEPTH = 8
_MAX_COMPARED = 20_000


def all_apart(schemas: Sequence[Any], resolve: Callable[[str], Any]) -> bool:
    """Whether it is plain to see that no value matches two of the schemas.

    Seen are types, constants, and properties that both require; anything else may overlap.

    Args:
        schemas: as parsed from JSON.
        resolve: the schema that a reference leads to; None: nowhere.
    """
    comparison = _Comparison(resolve)
    return all(
        comparison.apart(first, second, 0)
        for index, first in enumerate(schemas)
        for second in schemas[index + 1 :]
    )


class _Comparison:
    def __init__(self, resolve: Callable[[str], Any]) -> None:
        self._resolve, self._left = resolve, _MAX_COMPARED

    def apart(self, first: Any, second: Any, depth: int) -> bool:
        """Whether the two have no value in common; False where it is not known."""
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            return False
        if first is False or second is False:
            return True
        # A value matches all parts of a schema: it is enough that two parts are apart.
        others = list(self._parts(second, depth))
        return any(self._pair(a, b, depth) for a in self._parts(first, depth) for b in others)

    def _parts(self, schema: Any, depth: int) -> Iterator[Mapping[str, Any]]:
        """Schemas that a value must all match."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return
        yield schema
        if isinstance(schema.get("$ref"), str):
            yield from self._parts(self._resolve(schema["$ref"]), depth + 1)
        for part in _list(schema.get("allOf")):
            yield from self._parts(part, depth + 1)

    def _pair(self, first: Mapping[str, Any], second: Mapping[str, Any], depth: int) -> bool:
        for a, b in ((first, second), (second, first)):
            for keyword in ("anyOf", "oneOf"):
                choices = _list(a.get(keyword))
                if choices and all(self.apart(choice, b, depth + 1) for choice in choices):
                    return True
        if not _types(first) & _types(second):
            return True
        values = [_values(first), _values(second)]
        if None not in values:
            return not any(_equal(a, b) for a in values[0] for b in values[1])
        return self._property_tells(first, second, depth)

    def _property_tells(
        self, first: Mapping[str, Any], second: Mapping[str, Any], depth: int
    ) -> bool:
        """Whether a property that both require has values that are apart."""
        if _types(first) & _types(second) != {"object"}:
            return False
        mine, theirs = first.get("properties"), second.get("properties")
        if not isinstance(mine, Mapping) or not isinstance(theirs, Mapping):
            return False
        names = {n for n in _list(first.get("required")) if isinstance(n, str) and n in mine}
        names &= {n for n in _list(second.get("required")) if isinstance(n, str) and n in theirs}
        return any(self.apart(mine[name], theirs[name], depth + 1) for name in names)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """All values that a schema allows, where it lists them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """Types that values may have; integers are numbers here."""
    values = _values(schema)
    found = _TYPES if values is None else frozenset(map(_type, values))
    named = schema.get("type")
    names = [named] if isinstance(named, str) else _list(named)
    if named is None:
        return found
    return found & {"number" if name == "integer" else str(name) for name in names}


def _type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "number"
    return {str: "string", list: "array"}.get(type(value), "object")


def _equal(first: Any, second: Any) -> bool:
    """Equality as JSON schema has it: 1 is 1.0, but not true, at any depth."""
    if _type(first) != _type(second):
        return False
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    return first == second
