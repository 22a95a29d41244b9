"""Compiled constraints, and each request's place in its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_grammar import LIMITS, check_compiled, refusal
from oxillama_torch.workers import WorkerPool

__all__ = ["ConstraintCompiler", "ConstraintLimits", "Matcher", "Tokens", "Vocabulary"]

_WORKER = "oxillama_torch.sampling.constraint_worker"
# What a compiled grammar holds, measured: it grows with the grammar's text, and as it is used.
_ENTRY_BYTES = 256 * 1024
_GROWTH = 64
# Processor time that one step of one request may take: those of the others wait for it.
_LONGEST_S = 0.05


@dataclass(frozen=True, slots=True)
class ConstraintLimits:
    """What compiling constraints may use.

    Args:
        seconds: processor time for one, in the worker and once more here.
        memory: address space of a worker process, bytes.
        cache_bytes: of compiled grammars that are kept.
    """

    seconds: float = 0.2
    memory: int = 384 << 20
    cache_bytes: int = 128 << 20


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

    __slots__ = ("_goes_on", "_param", "_slow", "_tokens", "inner", "words")

    def __init__(self, inner: LLMatcher, tokens: Tokens, param: str, *, goes_on: bool) -> None:
        self.inner, self._tokens, self._param, self._goes_on = inner, tokens, param, goes_on
        self.words = -(-tokens.tokenizer.vocab_size // 32)
        self._slow = False

    @property
    def complete(self) -> bool:
        """Whether nothing can follow: the output ends here."""
        return self.inner.is_stopped() and not self.inner.is_error()

    @property
    def error(self) -> RequestError | None:
        """Why the grammar cannot be followed any further, if so."""
        if self._slow:
            return RequestError("the constraint takes too long to follow", param=self._param)
        return refusal(self.inner, self._param) if self.inner.is_error() else None

    def copy(self) -> Matcher:
        """One that goes its own way from here."""
        other = Matcher(self.inner.deep_copy(), self._tokens, self._param, goes_on=self._goes_on)
        other._slow = self._slow
        return other

    def accept(self, token_id: int) -> None:
        """Go on by one token; see ``error`` afterwards."""
        self.inner.consume_token(token_id)

    def forced(self) -> list[int]:
        """The tokens that come next whatever the logits say; often none."""
        with self.timed():
            return self.inner.compute_ff_tokens()

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Work done for this request alone: if it takes too long, that is an ``error``."""
        started = time.thread_time()
        yield
        self._slow |= time.thread_time() - started > _LONGEST_S

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

    Each is tried out in a worker process first, see ``constraint_worker``. What is compiled is kept
    as long as there is room, the one used longest ago giving way.

    Args:
        vocabulary: the model's tokenizer.
        limits: what compiling may use.
    """

    def __init__(self, vocabulary: Vocabulary, limits: ConstraintLimits | None = None) -> None:
        self._vocabulary, self._limits = vocabulary, limits or ConstraintLimits()
        self._lock = threading.Lock()
        # Now, while a model is being loaded: it takes the interpreter's lock, a large vocabulary
        # for a third of a second.
        self._tokens = _tokens(vocabulary)
        self._pool: WorkerPool | None = None
        self._compiled: OrderedDict[Constraint, tuple[LLMatcher, int]] = OrderedDict()
        self._kept_bytes = 0

    def matcher(self, constraint: Constraint, *, goes_on: bool = False) -> Matcher:
        """A matcher at the beginning of an output.

        Args:
            constraint: what the output must look like.
            goes_on: see Matcher.

        Raises:
            RequestError: the constraint is not sound, or costs too much.
            CapacityError: all workers stayed busy.
        """
        with self._lock:
            if self._pool is None:
                self._pool = _pool(self._vocabulary, self._tokens, self._limits)
            pool = self._pool
            compiled = self._find(constraint)
        if compiled is None:
            grammar = _try_out(constraint, pool)
            compiled = LLMatcher(self._tokens.tokenizer, grammar, log_level=0, limits=LIMITS)
            check_compiled(compiled, constraint)
            with self._lock:
                self._keep(constraint, compiled, _ENTRY_BYTES + _GROWTH * len(grammar))
        return Matcher(compiled.deep_copy(), self._tokens, constraint.param, goes_on=goes_on)

    def close(self) -> None:
        """End the worker processes; idempotent, also done when this is collected."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()

    def _find(self, constraint: Constraint) -> LLMatcher | None:
        entry = self._compiled.get(constraint)
        if entry is None:
            return None
        self._compiled.move_to_end(constraint)
        return entry[0]

    def _keep(self, constraint: Constraint, compiled: LLMatcher, size: int) -> None:
        _, before = self._compiled.pop(constraint, (None, 0))
        self._compiled[constraint] = compiled, size
        self._kept_bytes += size - before
        while self._kept_bytes > self._limits.cache_bytes and len(self._compiled) > 1:
            _, (_, freed) = self._compiled.popitem(last=False)
            self._kept_bytes -= freed


def _try_out(constraint: Constraint, pool: WorkerPool) -> str:
    """The grammar of a constraint that a worker has compiled and followed for a while.

    Raises:
        RequestError: it is not sound, or costs too much.
    """
    answer = pool.ask(asdict(constraint))
    if "grammar" in answer:
        return answer["grammar"]
    if "message" in answer:
        raise RequestError(answer["message"], param=answer["param"], code=answer["code"])
    raise RequestError("the constraint takes too much to compile", param=constraint.param)


def _pool(vocabulary: Vocabulary, tokens: Tokens, limits: ConstraintLimits) -> WorkerPool:
    special = {i: vocabulary.token_bytes(i).decode() for i in sorted(vocabulary.special_ids)}
    end_ids = tokens.end_ids.tolist() or [vocabulary.vocab_size]
    setup = {
        "vocab_size": vocabulary.vocab_size,
        "special": special if len(tokens.end_ids) else {**special, end_ids[0]: "<eos>"},
        "end": end_ids,
        "seconds": limits.seconds,
        "memory": limits.memory,
    }
    return WorkerPool(_WORKER, setup, seconds=limits.seconds, what="constraint")


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
