"""From texts to tokens, for parameters that speak of texts: bad words and DRY's breakers.

The front door asks for it, in the thread of the caller: the engine knows token ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Protocol

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["Vocabulary", "Words", "has_texts"]

# As llama.cpp has them: longer breakers are cut off.
_MAX_BREAKER_BYTES = 40
_MAX_TAIL = 20

#: Each costs a look at every token of the vocabulary.
_MAX_BREAKERS = 32


Ids = tuple[int, ...]


class Vocabulary(Protocol):
    """What is needed of ``tokenizer.tokenizer.Tokenizer``."""

    vocab_size: int

    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, add_special: bool, at_start: bool) -> list[int]: ...


def has_texts(params: SamplingParams) -> bool:
    """Whether parameters hold texts that the sampler would need as tokens."""
    words = params.bad_words
    if params.dry_multiplier > 0:
        words += params.dry_sequence_breakers
    return any(isinstance(word, str) for word in words)


class Words:
    """Texts as token sequences of one vocabulary. Any thread may ask.

    Args:
        vocabulary: the model's tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._breaker = lru_cache(maxsize=256)(self._find_breaker)

    def resolve(self, params: SamplingParams) -> SamplingParams:
        """The same parameters with token sequences in place of texts.

        Raises:
            RequestError: too many breakers, or a text that cannot be encoded.
        """
        breakers = params.dry_sequence_breakers if params.dry_multiplier > 0 else ()
        if sum(isinstance(breaker, str) for breaker in breakers) > _MAX_BREAKERS:
            raise RequestError(
                f"at most {_MAX_BREAKERS} sequence breakers", param="dry_sequence_breakers"
            )
        return replace(
            params,
            bad_words=_tokens(params.bad_words, self.bad_word),
            dry_sequence_breakers=_tokens(breakers, self._breaker),
        )

    def bad_word(self, text: str) -> tuple[tuple[int, ...], ...]:
        """A word at the start of a line and after a space, where that is another sequence."""
        found = dict.fromkeys(
            self._encode(form, "bad_words") for form in (text, " " + text.lstrip())
        )
        found.pop((), None)
        if not found:
            raise RequestError(f"no tokens spell the bad word {text!r}", param="bad_words")
        return tuple(found)

    def _find_breaker(self, text: str) -> tuple[tuple[int, ...], ...]:
        """Every token that holds the text, and every token that ends with its beginning together
        with the tokens of the rest."""
        try:
            wanted = text.encode()[:_MAX_BREAKER_BYTES]
        except UnicodeEncodeError:
            raise RequestError(
                "the text holds a lone surrogate", param="dry_sequence_breakers"
            ) from None
        starts = tuple(wanted[:size] for size in range(1, len(wanted)))
        tails: dict[bytes, tuple[int, ...]] = {}
        found: dict[tuple[int, ...], None] = {}
        for token_id, piece in enumerate(self._pieces):
            if wanted in piece:
                found[(token_id,)] = None
            elif starts and piece.endswith(starts):
                for start in filter(piece.endswith, starts):
                    if start not in tails:
                        tails[start] = self._tail(wanted[len(start) :])
                    if tails[start]:
                        found[(token_id, *tails[start])] = None
        return tuple(found)

    def _tail(self, rest: bytes) -> tuple[int, ...]:
        """The tokens of the rest of a breaker; none where it begins inside a character."""
        try:
            text = rest.decode()
        except UnicodeDecodeError:
            return ()
        return self._encode(text, "dry_sequence_breakers")[:_MAX_TAIL]

    def _encode(self, text: str, param: str) -> Ids:
        try:
            return tuple(self._vocabulary.encode(text, add_special=False, at_start=False))
        except RequestError as error:
            raise RequestError(str(error), param=param) from None

    @cached_property
    def _pieces(self) -> list[bytes]:
        return [self._vocabulary.token_bytes(i) for i in range(self._vocabulary.vocab_size)]


def _tokens(words: Sequence[str | Ids], find: Callable[[str], tuple[Ids, ...]]) -> tuple[Ids, ...]:
    """Token sequences as they are, texts as what ``find`` makes of them."""
    groups = [find(word) if isinstance(word, str) else (word,) for word in words]
    return tuple(sequence for group in groups for sequence in group)
