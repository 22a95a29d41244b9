"""Constraints in llguidance's language. No vocabulary is needed to say whether one is sound."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_gbnf import GbnfError, gbnf_to_lark
from oxillama_torch.sampling.constraint_lark import prepare_lark
from oxillama_torch.sampling.constraint_schema import prepare_schema

__all__ = ["LIMITS", "check_compiled", "refusal", "to_grammar"]

#: What llguidance may spend on one grammar and on one token, in its own units (see its docs).
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)

_MAX_CHOICES = 10_000
_LONGEST_MESSAGE = 300


def to_grammar(constraint: Constraint) -> str:
    """The grammar that ``llguidance.LLMatcher`` takes.

    Raises:
        RequestError: names what is wrong; its ``param`` is that of the constraint or lies below it.
    """
    source, param = constraint.source, constraint.param
    match constraint.kind:
        case "gbnf":
            try:
                return gbnf_to_lark(source)
            except GbnfError as error:
                raise RequestError(f"the grammar is not sound: {error}", param=param) from None
        case "lark":
            return prepare_lark(source, param, lambda text: _parse(text, param))
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            return _choice(_whole(source, param), param)
    schema = {"type": "object"} if constraint.kind == "json_object" else _whole(source, param)
    return LLMatcher.grammar_from_json_schema(json.dumps(prepare_schema(schema, param)))


def check_compiled(matcher: LLMatcher, constraint: Constraint) -> None:
    """Refuse what llguidance did not take.

    Raises:
        RequestError: with llguidance's own words.
    """
    if matcher.is_error():
        raise RequestError(
            f"the {constraint.kind} constraint cannot be compiled: {_message(matcher)}",
            param=constraint.param,
        )


def refusal(matcher: LLMatcher, param: str) -> RequestError:
    """Why a grammar that was compiled cannot be followed any further."""
    message = _message(matcher)
    if "NoExtension" in message:
        return RequestError("the constraint allows no text at all", param=param)
    return RequestError(f"the constraint is too costly to follow: {message}", param=param)


def _message(matcher: LLMatcher) -> str:
    """llguidance's own words, without the backtrace of Rust that may come after them."""
    message = re.split(r"<backtrace>|stack backtrace|<non-verbose/>", matcher.get_error())[0]
    if message.startswith("oneOf constraints"):
        return "'oneOf' is supported where no value can match two of its schemas, plainly to see"
    return message.strip()[:_LONGEST_MESSAGE]


def _choice(texts: Any, param: str) -> str:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError("a list of strings", param=param, code="invalid_type")
    if not 0 < len(texts) <= _MAX_CHOICES:
        raise RequestError(f"between 1 and {_MAX_CHOICES} choices", param=param)
    # One expression: as alternatives of a rule, a few thousand of them are too many.
    return "start: C\nC: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def _whole(text: str, param: str) -> Any:
    value, end = _parse(text.strip(), param)
    if text.strip()[end:]:
        raise RequestError("not a valid JSON text", param=param)
    return value


def _parse(text: str, param: str) -> tuple[Any, int]:
    """The JSON at the beginning of a text, and where it ends."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name twice")
        return found

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError("a number out of range")
        return value

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    try:
        return decoder.raw_decode(text)
    except (ValueError, RecursionError):
        raise RequestError(
            "not a valid JSON text, or one that names a thing twice", param=param
        ) from None
