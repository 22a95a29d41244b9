"""Does a constraint accept a text? Asked of llguidance with a vocabulary of single bytes."""

from __future__ import annotations

import functools

from llguidance import LLMatcher, LLTokenizer

from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_grammar import LIMITS, check_compiled, to_grammar

__all__ = ["accepts"]


@functools.cache
def _matcher(constraint: Constraint) -> LLMatcher:
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, to_grammar(constraint), log_level=0, limits=LIMITS)
    check_compiled(matcher, constraint)
    return matcher


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether ``text`` is one that the constraint allows, as a whole."""
    matcher = _matcher(constraint).deep_copy()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()
