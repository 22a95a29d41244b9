"""JSON schemas as llguidance may have them: what it would take lightly is refused or made exact.

llguidance 1.9 refuses most of what it does not enforce. Found by running the official test suite
through it, this is what it lets pass: unknown keywords and formats of values that are no strings,
integers beyond 2**53 (rounded), dates such as 2021-02-29 and leap seconds at any hour, property
names written with ``\\u`` (which evade the property's schema), names that repeat where
``minProperties`` counts them, control characters of constants and patterns (left out where ``\\u``
is not allowed), Rust's syntax in patterns, and keywords that look at their neighbours, such as
``additionalItems``, when something stands between them.

Specification: https://json-schema.org/draft/2020-12/json-schema-validation
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint_oneof import all_apart

__all__ = ["ENFORCED", "FORMATS", "IGNORED", "STYLE", "prepare_schema"]

#: Options for llguidance. White space is bounded, or a weak model writes nothing else.
STYLE = {
    "whitespace_pattern": r"(?: |\n{1,2}[ \t]{0,20})",
    "json_allowed_escapes": 'nrbtf\\"',
}

#: Keywords that are enforced.
ENFORCED = frozenset(
    """
    type enum const anyOf oneOf allOf $ref
    items prefixItems additionalItems minItems maxItems
    properties patternProperties additionalProperties required minProperties maxProperties
    minLength maxLength pattern format
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf
    """.split()  # noqa: SIM905
)

#: Keywords that say nothing about what is valid.
IGNORED = frozenset(
    """
    $schema $id id $anchor $comment $defs definitions
    title description default examples deprecated readOnly writeOnly
    """.split()  # noqa: SIM905
)

_YEAR = r"(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
#: Formats by name; None where llguidance's own is exact.
FORMATS: dict[str, str | None] = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    **dict.fromkeys(("duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")),
}

_DRAFTS = re.compile(
    r"https?://json-schema\.org/(draft/2020-12|draft/2019-09|draft-0[467])/schema#?"
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_EXACT = 1 << 53
_MAX_DEPTH = 60  # llguidance stops at 128 levels of JSON
_APPLICATORS = ("anyOf", "oneOf", "allOf", "$ref")
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_RUST_CLASS = re.compile(r"\[|&&|--|~~|^\^?\]")
_CONTROL = re.compile(
    r"[\x00-\x07\x0b\x0e-\x1f\x7f]"
    r"|\\(?:[va]|x[01][0-9A-Fa-f]|x7[Ff]|u00[01][0-9A-Fa-f]|u007[Ff]"
    r"|[xu]\{0*(?:[01]?[0-9A-Fa-f]|7[Ff])\})"
)
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F))) + "é漢\n"


def prepare_schema(schema: Any, param: str, style: Mapping[str, Any] = STYLE) -> dict[str, Any]:
    """The schema that llguidance is given.

    Args:
        schema: as parsed from JSON.
        param: what errors call it; paths within it are added.
        style: llguidance's options.

    Raises:
        RequestError: a keyword or format that would not be enforced, or a reference that leads
            nowhere.
    """
    walk = _Walk(param, schema)
    prepared = walk.schema(schema, "", 0)
    walk.check_references()
    if isinstance(prepared, bool):
        prepared = {} if prepared else {"enum": []}
    # At the end, where llguidance takes it out again without changing the order of the rest.
    return {**prepared, "x-guidance": dict(style)}


class _Walk:
    """One pass over a schema; pointers (``/properties/a``) tell where it is."""

    def __init__(self, param: str, root: Any) -> None:
        self._param, self._root = param, root
        self._seen: set[str] = set()
        self._anchors: set[str] = set()
        self._references: list[tuple[str, str]] = []

    def schema(self, schema: Any, at: str, depth: int) -> Any:
        """Check a schema and all within it; return it made exact."""
        self._seen.add(at)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._error("a schema is an object, true or false", at)
        if depth > _MAX_DEPTH:
            raise self._error(f"schemas within more than {_MAX_DEPTH} others", at)
        made: dict[str, Any] = {}
        for keyword, value in schema.items():
            here = f"{at}/{_escape(keyword)}"
            if keyword in IGNORED and keyword not in _MAPS:
                self._note(keyword, value, at)
                continue
            if keyword not in ENFORCED and keyword not in IGNORED:
                raise self._error(f"the keyword {keyword!r} is not supported", here)
            made[keyword] = self._value(keyword, value, here, depth)
        if "oneOf" in made and all_apart(schema["oneOf"], self._resolve):
            choices = made.pop("oneOf")
            made["allOf"] = [*made.get("allOf", ()), {"anyOf": choices}]
        self._check_sizes(schema, at)
        return _grouped(self._with_format(made, f"{at}/format"))

    def check_references(self) -> None:
        """Whether each ``$ref`` leads to a schema that has been looked at."""
        for reference, at in self._references:
            if not reference.startswith("#"):
                raise self._error("only references within the schema are supported", at)
            target = unquote(reference[1:])
            known = self._seen if target[:1] in ("", "/") else self._anchors
            if target.rstrip("/") not in known:
                raise self._error(f"{reference!r} leads to no schema", at)

    def _resolve(self, reference: str) -> Any:
        """What a reference by pointer leads to; None for others, and where there is nothing."""
        found = self._root
        for part in unquote(reference).split("/")[1:] if reference[:1] == "#" else ["", ""]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            else:
                found = found.get(part) if isinstance(found, dict) else None
        return found

    def _value(self, keyword: str, value: Any, at: str, depth: int) -> Any:
        if keyword in _MAPS:
            if not isinstance(value, dict):
                raise self._error("an object of schemas", at)
            if keyword == "patternProperties":
                for pattern in value:
                    self._check_pattern(pattern, f"{at}/{_escape(pattern)}")
            return {k: self.schema(v, f"{at}/{_escape(k)}", depth + 1) for k, v in value.items()}
        if keyword in _LISTS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list) or not value:
                raise self._error("a list of schemas, not an empty one", at)
            return [self.schema(v, f"{at}/{i}", depth + 1) for i, v in enumerate(value)]
        if keyword in _SINGLE:
            return self.schema(value, at, depth + 1)
        check = {
            "$ref": self._note_reference,
            "pattern": self._check_pattern,
            "enum": self._check_constant,
            "const": self._check_constant,
            **dict.fromkeys(_NUMBERS, self._check_constant),
        }.get(keyword)
        if check is not None:
            check(value, at)
        return value

    def _note(self, keyword: str, value: Any, at: str) -> None:
        """Annotations that change what references mean."""
        here = f"{at}/{keyword}"
        if keyword in ("$id", "id") and at and isinstance(value, str):
            raise self._error(f"{keyword!r} of a schema within another is not supported", here)
        if keyword == "$schema" and not (isinstance(value, str) and _DRAFTS.fullmatch(value)):
            raise self._error("drafts 4 to 2020-12 are supported", here)
        if keyword == "$anchor":
            self._anchors.add(str(value))

    def _note_reference(self, value: Any, at: str) -> None:
        if not isinstance(value, str):
            raise self._error("a string", at)
        self._references.append((value, at))

    def _check_sizes(self, schema: Mapping[str, Any], at: str) -> None:
        """Names of properties that the schema does not list may repeat in what is generated."""
        least, required = schema.get("minProperties"), schema.get("required")
        sure = len(set(map(str, required))) if isinstance(required, list) else 0
        if isinstance(least, int) and least > max(1, sure):
            raise self._error(
                "minProperties above 1 is supported where 'required' names as many",
                f"{at}/minProperties",
            )
        if "additionalItems" in schema and not isinstance(schema.get("items"), list):
            raise self._error("means nothing unless 'items' is a list", f"{at}/additionalItems")

    def _check_constant(self, value: Any, at: str) -> None:
        """Numbers are compared as doubles: integers beyond 2**53 would be rounded."""
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, str):
            if _CONTROL.search(value.replace("\\", "")):
                raise self._error("control characters without a short escape", at)
            return
        if isinstance(value, int | float):
            if abs(value) > _EXACT:
                raise self._error("numbers beyond 2**53 are not exact", at)
            return
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            self._check_constant(part, f"{at}/{_escape(str(name))}")

    def _check_pattern(self, pattern: Any, at: str) -> None:
        """Refuse what Rust's expressions read differently than ECMAScript's."""
        if not isinstance(pattern, str):
            raise self._error("a string", at)
        plain = pattern.replace("\\\\", "")  # without escaped backslashes
        for found in _CLASS.findall(plain):
            if _RUST_CLASS.search(re.sub(r"\\.", "", found[1:-1])):
                raise self._error(f"escape '[', '&', '-' and '~' in the class {found}", at)
            if _CONTROL.search(found) and not _matches_some(found):
                raise self._error(f"the class {found} has nothing but control characters", at)
        if _CONTROL.search(_CLASS.sub("", plain)):
            raise self._error("control characters without a short escape", at)

    def _with_format(self, schema: dict[str, Any], at: str) -> dict[str, Any]:
        """The schema with a pattern instead of a format that llguidance knows too loosely."""
        name = schema.get("format")
        if name is None:
            return schema
        if name not in FORMATS:
            raise self._error(f"the format {name!r} is none of: {', '.join(sorted(FORMATS))}", at)
        pattern = FORMATS[name]
        if pattern is None:
            return schema
        rest = {key: value for key, value in schema.items() if key != "format"}
        if "pattern" not in rest:
            return {**rest, "pattern": pattern}
        return {**rest, "allOf": [*rest.get("allOf", ()), {"pattern": pattern}]}

    def _error(self, message: str, at: str) -> RequestError:
        where = "".join(
            f"[{part}]" if part.isdigit() else f".{part.replace('~1', '/').replace('~0', '~')}"
            for part in at.split("/")[1:]
        )
        param = f"{self._param}{where}"
        return RequestError(f"{message} (at {param})", param=param, code="unsupported_schema")


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def _matches_some(character_class: str) -> bool:
    """Whether a class has a character that is no control character."""
    try:
        return re.search(character_class, _PRINTABLE) is not None
    except re.error:
        return True  # llguidance may know it, or says what is wrong


def _grouped(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the keywords that look at each other side by side.

    Whether properties of this schema or of those it is combined with come first in the output is
    decided, as in llguidance, by what comes first here.
    """
    applied = {key: schema[key] for key in schema if key in _APPLICATORS}
    own = {key: schema[key] for key in schema if key not in _APPLICATORS}
    names = list(schema)
    anchor = names.index("properties") if "properties" in own else 0
    first = min((names.index(key) for key in applied), default=len(names))
    return {**applied, **own} if first < anchor else {**own, **applied}
