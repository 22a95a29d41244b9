"""Compiled constraints, and each request's place in its own."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_grammar import LIMITS, check_compiled, to_grammar

__all__ = ["ConstraintCompiler", "Matcher", "Tokens", "Vocabulary"]

_CACHED = 256


class Vocabulary(Protocol):
    """What constraints need to know of ``tokenizer.tokenizer.Tokenizer``."""

    vocab_size: int
    eos_ids: frozenset[int]
    special_ids: frozenset[int]
    suppressed_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, add_special: bool, at_start: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """A vocabulary as llguidance has it.

    Args:
        tokenizer: llguidance's own.
        vocab_size: ids from here on are no tokens.
        end_ids: int64, tokens that end a text.
    """

    tokenizer: LLTokenizer
    vocab_size: int
    end_ids: np.ndarray


class Matcher:
    """Where one request stands in its grammar; used by one thread at a time.

    Args:
        inner: llguidance's state.
        tokens: the vocabulary it speaks of.
        param: what errors call the constraint.
        goes_on: end tokens are allowed only where nothing else is (``ignore_eos``).

    Attributes:
        words: 32-bit words of a mask.
    """

    __slots__ = ("_goes_on", "_param", "_tokens", "inner", "words")

    def __init__(self, inner: LLMatcher, tokens: Tokens, param: str, *, goes_on: bool) -> None:
        self.inner, self._tokens, self._param, self._goes_on = inner, tokens, param, goes_on
        self.words = -(-tokens.tokenizer.vocab_size // 32)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow: the output ends here."""
        return self.inner.is_stopped() and not self.inner.is_error()

    @property
    def error(self) -> RequestError | None:
        """Why the grammar cannot be followed any further, if so."""
        if not self.inner.is_error():
            return None
        return RequestError(
            f"the constraint has become too costly to follow ({self.inner.stop_reason()})",
            param=self._param,
        )

    def accept(self, token_id: int) -> None:
        """Go on by one token; see ``error`` afterwards."""
        self.inner.consume_token(token_id)

    def forced(self) -> list[int]:
        """The tokens that come next whatever the logits say; often none."""
        return self.inner.compute_ff_tokens()

    def restrict(self, allowed: np.ndarray) -> None:
        """Take out of a mask what llguidance does not know of; in place.

        Args:
            allowed: uint8 [V], 0 or 1.
        """
        allowed[self._tokens.vocab_size :] = 0
        if self._goes_on:
            ends = allowed[self._tokens.end_ids]
            allowed[self._tokens.end_ids] = 0
            if not allowed.any():
                allowed[self._tokens.end_ids] = ends


class ConstraintCompiler:
    """Compiles constraints for one model; safe to use from many threads.

    Args:
        vocabulary: the model's tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokens: Tokens | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def matcher(self, constraint: Constraint, *, goes_on: bool = False) -> Matcher:
        """A matcher at the beginning of an output.

        Args:
            constraint: what the output must look like.
            goes_on: see Matcher.

        Raises:
            RequestError: the constraint is not sound, or costs too much.
        """
        with self._lock:
            if self._tokens is None:
                self._tokens = _tokens(self._vocabulary)
            compiled = self._compiled.pop(constraint, None)
            if compiled is not None:
                self._compiled[constraint] = compiled
        if compiled is None:
            compiled = self._compile(constraint, self._tokens)
        return Matcher(compiled.deep_copy(), self._tokens, constraint.param, goes_on=goes_on)

    def _compile(self, constraint: Constraint, tokens: Tokens) -> LLMatcher:
        grammar = to_grammar(constraint)
        compiled = LLMatcher(tokens.tokenizer, grammar, log_level=0, limits=LIMITS)
        check_compiled(compiled, constraint)
        with self._lock:
            self._compiled[constraint] = compiled
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        return compiled


def _tokens(vocabulary: Vocabulary) -> Tokens:
    wrapped = _Wrapped(vocabulary)
    return Tokens(
        LLTokenizer(wrapped, eos_token=wrapped.eos_token_ids),
        vocabulary.vocab_size,
        np.array(sorted(vocabulary.eos_ids), np.int64),
    )


class _Wrapped:
    """A vocabulary in the form of ``llguidance.TokenizerWrapper``."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.tokens = [self._bytes(i) for i in range(vocabulary.vocab_size)]
        self.special_token_ids = sorted(vocabulary.special_ids)
        self.eos_token_ids = sorted(vocabulary.eos_ids)
        if not self.eos_token_ids:
            # llguidance wants one; it lies beyond the vocabulary, where masks are cut off.
            self.eos_token_ids = [len(self.tokens)]
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<eos>")
        self.eos_token_id = self.eos_token_ids[0]

    def _bytes(self, token_id: int) -> bytes:
        """A token's bytes; none, so that no grammar asks for it, for one that must not come up."""
        if token_id in self._vocabulary.suppressed_ids:
            return b""
        data = self._vocabulary.token_bytes(token_id)
        # 0xFF is no byte of any text; to llguidance it is the mark of special tokens.
        return b"" if data[:1] == b"\xff" else data

    def __call__(self, text: str) -> Sequence[int]:
        return self._vocabulary.encode(text, add_special=False, at_start=False)
