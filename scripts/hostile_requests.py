"""Requests that are made to hold a server up, for ``bench_hostile.py``.

Each kind fits what the server says it accepts in one way, and overdoes it in another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["MODEL", "Hostile", "hostile_requests"]

#: What the server calls its model.
MODEL = "bench"

_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Hostile:
    """A request.

    Args:
        kind: what is overdone.
        path: of a POST.
        body: bytes.
        content_type: of the body.
    """

    kind: str
    path: str
    body: bytes
    content_type: str = _JSON


def hostile_requests() -> Iterator[Hostile]:
    """All kinds, bodies first, then what is in them."""
    yield from _documents()
    yield from _fields()
    yield from _constraints()
    yield from _schemas()
    yield from _uploads()


def _documents() -> Iterator[Hostile]:
    """Bodies that a JSON parser, or what looks at its result, would choke on."""
    yield Hostile("arrays 100,000 deep", _CHAT, b"[" * 100_000 + b"]" * 100_000)
    yield Hostile("objects 50,000 deep", _CHAT, b'{"a":' * 50_000 + b"1" + b"}" * 50_000)
    yield _of("390,000 numbers", _CHAT, {"messages": [0] * 390_000})
    yield _of("19,000 messages", _CHAT, {"messages": [{"role": "user", "content": "a"}] * 19_000})
    yield _of("300,000 keys", _CHAT, {"messages": [], "x": {f"k{i}": 0 for i in range(300_000)}})
    yield Hostile("a number of 4,000,000 digits", _CHAT, b'{"n":' + b"1" * 4_000_000 + b"}")
    yield Hostile("1,900,000 backslashes", _CHAT, b'{"m":"' + b"\\\\" * 1_900_000 + b'"}')
    yield Hostile("4,000,000 quotes", _CHAT, b'"' * 4_000_000)


def _fields() -> Iterator[Hostile]:
    """Fields with more in them than a request has use for."""
    yield _prompt("a word of 4,000,000 letters", "a" * 4_000_000)
    yield _prompt("4,000,000 blanks", " " * 4_000_000)
    yield _prompt("1,000,000 astral characters", "\U0001f600" * 1_000_000)
    yield _of("300,000 prompts", _COMPLETIONS, {"prompt": ["a"] * 300_000})
    yield _of("300,000 token ids", _COMPLETIONS, {"prompt": [1] * 300_000})
    yield _prompt("100,000 stop strings", "a", stop=["b"] * 100_000)
    yield _prompt("a stop string of 4,000,000 letters", "a", stop="b" * 4_000_000)
    yield _prompt("300,000 biases", "a", logit_bias={str(i): 1 for i in range(300_000)})
    yield _of("a message of 3,900,000 letters", _CHAT, _chat("<|im_end|>" * 390_000))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    yield _of("4,000 tools", _CHAT, _chat("a", tools=[tool] * 4_000))
    yield _of("100,000 embeddings", "/v1/embeddings", {"input": ["a"] * 100_000})


def _constraints() -> Iterator[Hostile]:
    """Grammars and patterns that take long to compile or to follow."""
    nested = "root ::= " + "(" * 2_000 + '"a"' + ")" * 2_000
    yield _prompt("a grammar of groups 2,000 deep", "a", grammar=nested)
    chain = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(2_000))
    yield _prompt("a grammar of rules 2,000 deep", "a", grammar=chain + 'r2000 ::= "a"\n')
    doubling = "root ::= r0 r0\n" + "".join(f"r{i} ::= r{i + 1} r{i + 1}\n" for i in range(40))
    yield _prompt("a grammar that doubles 40 times", "a", grammar=doubling + 'r40 ::= "a"\n')
    yield _prompt("a grammar of 250,000 letters", "a", grammar='root ::= "' + "a" * 250_000 + '"')
    ambiguous = 'root ::= x\nx ::= "a" | x2 x2\nx2 ::= "a" x | x x3\nx3 ::= x x2 | "a"\n'
    yield _prompt("an ambiguous grammar", "a", grammar=ambiguous)
    yield _prompt("repeats within repeats", "a", regex="(((a{1,999}){1,999}){1,999}){1,999}")
    yield _prompt("a pattern that backtracks", "a", regex="(a|a)*(a|aa)+" * 200 + "b")
    yield _prompt("a pattern with 3,000 classes", "a", regex=r"[\s\S]?" * 3_000)
    yield _prompt("5,000 choices", "a", choice=["a" * 40 + str(i) for i in range(5_000)])


def _schemas() -> Iterator[Hostile]:
    """JSON schemas."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(25):  # two levels of JSON each
        deep = {"type": "object", "properties": {"a": deep}}
    yield _schema("a schema 50 deep", deep)
    yield _schema("a schema that refers to itself", {"$ref": "#"})
    loop = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    yield _schema("references in a ring", loop)
    yield _schema("an enum of 20,000", {"enum": [f"value {i}" for i in range(20_000)]})
    wide = {f"p{i}": {"type": "string"} for i in range(6_000)}
    yield _schema("6,000 properties", {"type": "object", "properties": wide})
    many = {"allOf": [{"anyOf": [{"minimum": i}, {"maximum": -i}]} for i in range(30)]}
    yield _schema("2^30 alternatives", many)
    long = {"type": "string", "minLength": 100_000, "maxLength": 900_000}
    yield _schema("a string of 900,000 letters", long)
    power = {"allOf": [{"type": "integer", "multipleOf": n} for n in (7919, 7907, 7901, 7883)]}
    yield _schema("multiples of four primes", power)


def _uploads() -> Iterator[Hostile]:
    """Multipart bodies."""
    part = b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\na\r\n'
    parts = b"".join(part % i for i in range(50_000)) + b"--x--\r\n"
    yield Hostile(
        "an upload of 50,000 parts", "/v1/files", parts, "multipart/form-data; boundary=x"
    )
    head = (
        b'--x\r\nContent-Disposition: form-data; name="' + b"a" * 3_000_000 + b'"\r\n\r\na\r\n--x--'
    )
    yield Hostile("a part's name of 3 MB", "/v1/files", head, "multipart/form-data; boundary=x")
    lines = b"--" + b"-x" * 1_500_000
    yield Hostile(
        "boundaries that almost match", "/v1/files", lines, "multipart/form-data; boundary=-x-"
    )


def _of(kind: str, path: str, fields: dict[str, Any]) -> Hostile:
    body = {"model": MODEL, "max_tokens": 4, **fields}
    return Hostile(kind, path, json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode())


def _prompt(kind: str, prompt: str, **fields: Any) -> Hostile:
    return _of(kind, _COMPLETIONS, {"prompt": prompt, **fields})


def _chat(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def _schema(kind: str, schema: dict[str, Any]) -> Hostile:
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    return _of(kind, _COMPLETIONS, {"prompt": "a", "response_format": asked})
