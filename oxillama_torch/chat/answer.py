"""What the answer itself has to be: formats and grammars, alone or behind calls and reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oxillama_torch.chat.grammar import json_rule, literal
from oxillama_torch.chat.schema import check_enforceable, check_strict
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_gbnf import GbnfError, gbnf_to_lark

__all__ = ["Answer", "answer_of"]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_IN_SLASHES = {"/": r"\/", "\n": r"\n"}
# Converting takes 5 us a character, which other threads have to share.
_LONGEST_PART = 8 * 1024
_START = re.compile(r'("(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/)|\bstart\b')


@dataclass(frozen=True, slots=True)
class Answer:
    """A constraint of the answer.

    Args:
        constraint: where the answer is all that the model writes.
        rule: the same as the body of a Lark rule; None: to be made of the constraint.
    """

    constraint: Constraint
    rule: str | None = None

    @property
    def can_be_part(self) -> bool:
        """Of another grammar; the names in a Lark grammar may be those of the one around it."""
        return self.rule is not None or self.constraint.kind != "lark"

    def body(self) -> str:
        """The body of a Lark rule; further rules may follow it on lines of their own.

        A grammar is converted here and not in the worker that compiles it: call this where the
        answer is part of another grammar only.

        Raises:
            RequestError: the constraint is not sound, or too long for that.
        """
        return _body(self.constraint) if self.rule is None else self.rule


def answer_of(wanted: Any, own: Constraint | None) -> Answer | None:
    """The constraint of an answer; None: it is free.

    Args:
        wanted: ``response_format`` of the chat route.
        own: a constraint among the sampling parameters.

    Raises:
        RequestError: names the field that is wrong; both are given.
    """
    if wanted is None or (isinstance(wanted, Mapping) and wanted.get("type") == "text"):
        return None if own is None else Answer(own)
    if own is not None:
        raise RequestError("one constraint at a time: a format and a grammar", param=own.param)
    if not isinstance(wanted, Mapping):
        raise RequestError("a format is an object", param="response_format", code="invalid_type")
    kind, param = wanted.get("type"), "response_format"
    if kind == "json_schema":
        schema = _schema(wanted.get("json_schema"), "response_format.json_schema")
        param = "response_format.json_schema.schema"
    elif kind == "json_object":
        schema = {"type": "object"}
    else:
        raise RequestError(
            "the type is text, json_object or json_schema", param="response_format.type"
        )
    body = json_rule(schema)
    return Answer(Constraint("lark", f"start: {body}\n", param), body)


def _schema(wanted: Any, param: str) -> dict[str, Any]:
    if not isinstance(wanted, Mapping):
        raise RequestError("an object with name and schema", param=param, code="invalid_type")
    name, schema = wanted.get("name"), wanted.get("schema")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            "a name has 1 to 64 letters, digits, underscores and hyphens", param=f"{param}.name"
        )
    if schema is None:
        return {"type": "object"}
    if not isinstance(schema, Mapping):
        raise RequestError(
            "a JSON schema is an object", param=f"{param}.schema", code="invalid_type"
        )
    if wanted.get("strict") is True:
        check_strict(schema, f"{param}.schema")
    check_enforceable(schema, f"{param}.schema")
    return dict(schema)


def _body(constraint: Constraint) -> str:
    """A constraint as the body of a Lark rule."""
    source = constraint.source
    if constraint.kind == "gbnf" and len(source) > _LONGEST_PART:
        raise RequestError(
            f"beside tools or reasoning a grammar has at most {_LONGEST_PART} characters",
            param=constraint.param,
        )
    match constraint.kind:
        case "json_object":
            return json_rule({"type": "object"})
        case "json_schema":
            return json_rule(_loads(constraint))
        case "choice":
            return " | ".join(literal(str(text)) for text in _loads(constraint))
        case "regex":
            # Within slashes; an empty one would begin a comment.
            inner = re.sub(r"\\.|[/\n]", lambda m: _IN_SLASHES.get(m[0], m[0]), source)
            return f"/(?:{inner})/"
        case "gbnf":
            try:
                rules = gbnf_to_lark(source)
            except GbnfError as error:
                raise RequestError(
                    f"the grammar is not sound: {error}", param=constraint.param
                ) from None
            # Its first rule is called start, as that of the grammar around it.
            renamed = _START.sub(lambda m: m[1] or "answer", rules)
            return renamed.partition("answer:")[2].strip()
    raise AssertionError(f"a constraint of kind {constraint.kind} cannot be part of another")


def _loads(constraint: Constraint) -> Any:
    try:
        return json.loads(constraint.source)
    except (ValueError, RecursionError):
        raise RequestError("not a valid JSON text", param=constraint.param) from None
