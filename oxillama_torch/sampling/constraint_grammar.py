"""Constraints in llguidance's language. No vocabulary is needed to say whether one is sound."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint

__all__ = ["LIMITS", "check_compiled", "to_grammar"]

#: What llguidance may spend on one grammar and on one token, in its own units (see its docs).
LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
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
    source = constraint.source
    match constraint.kind:
        case "lark":
            return source
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            return _choice(_json(constraint), constraint.param)
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}')
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(json.dumps(_json(constraint)))
    raise AssertionError(f"constraint of kind {constraint.kind!r}")


def check_compiled(matcher: LLMatcher, constraint: Constraint) -> None:
    """Refuse what llguidance did not take.

    Raises:
        RequestError: with llguidance's own words.
    """
    if matcher.is_error():
        # Behind the message may stand a backtrace of Rust, of no use to anybody who asks.
        message = re.split(r"<backtrace>|stack backtrace", matcher.get_error())[0].strip()
        raise RequestError(
            f"the {constraint.kind} constraint cannot be compiled: {message[:_LONGEST_MESSAGE]}",
            param=constraint.param,
        )


def _json(constraint: Constraint) -> Any:
    try:
        return json.loads(constraint.source)
    except (ValueError, RecursionError):
        raise RequestError("not a valid JSON text", param=constraint.param) from None


def _choice(texts: Any, param: str) -> str:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError("a list of strings", param=param, code="invalid_type")
    if not 0 < len(texts) <= _MAX_CHOICES:
        raise RequestError(f"between 1 and {_MAX_CHOICES} choices", param=param)
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
