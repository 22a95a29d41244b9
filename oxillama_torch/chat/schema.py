"""JSON schemas of arguments and answers: what is asked of them before anything is generated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint_schema import prepare_schema

__all__ = ["check_enforceable", "check_object", "check_strict", "is_enforceable"]

_BELOW = ("items", "additionalProperties", "not", "if", "then", "else", "contains")
_BELOW_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_BELOW_NAMES = ("properties", "patternProperties", "$defs", "definitions")


def check_object(schema: Any, param: str) -> None:
    """Refuse what cannot be the schema of a JSON object."""
    if not isinstance(schema, Mapping):
        raise RequestError("a JSON schema is an object", param=param, code="invalid_type")
    if schema.get("type", "object") != "object":
        raise RequestError("arguments are an object", param=f"{param}.type")
    if not isinstance(schema.get("properties", {}), Mapping):
        raise RequestError("the properties are an object", param=f"{param}.properties")


def check_strict(schema: Mapping[str, Any], param: str) -> None:
    """What ``"strict": true`` asks for: no other properties, all required, every keyword enforced.

    Raises:
        RequestError: names the object or the keyword.
    """
    check_enforceable(schema, param)  # from here on it has the form of a schema
    for where, part in _parts(schema, param):
        if "properties" not in part and part.get("type") != "object":
            continue
        if part.get("additionalProperties") is not False:
            raise RequestError(
                "a strict schema needs 'additionalProperties': false in every object",
                param=where,
                code="invalid_schema",
            )
        required = part.get("required")
        required = required if isinstance(required, list) else []
        missing = [key for key in part.get("properties", {}) if key not in required]
        if missing:
            raise RequestError(
                f"in a strict schema every property is required; {missing[0]!r} is not",
                param=where,
                code="invalid_schema",
            )


def check_enforceable(schema: Mapping[str, Any], param: str) -> None:
    """Refuse a schema that generation cannot be held to.

    Raises:
        RequestError: names the keyword.
    """
    prepare_schema(schema, param)


def is_enforceable(schema: Mapping[str, Any]) -> bool:
    """Whether generation can be held to a schema."""
    try:
        check_enforceable(schema, "schema")
    except RequestError:
        return False
    return True


def _parts(schema: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All schemas in a schema with their places."""
    if not isinstance(schema, Mapping):
        return
    yield where, schema
    for key in _BELOW:
        yield from _parts(schema.get(key), f"{where}.{key}")
    for key in _BELOW_LISTS:
        for i, item in enumerate(schema.get(key) or ()):
            yield from _parts(item, f"{where}.{key}[{i}]")
    for key in _BELOW_NAMES:
        for name, item in (schema.get(key) or {}).items():
            yield from _parts(item, f"{where}.{key}.{name}")
