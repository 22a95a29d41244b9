"""SentencePiece-BPE encoding, exactly as the scores in the file say.

A text starts as single characters. Of all neighbours whose concatenation is a token, the pair
whose token has the highest score joins first, the leftmost of equals first, until none is left.
What is then no token is written as its UTF-8 bytes (``<0x0A>``), or as the unknown token.

``tokenizers`` ranks *pairs* of tokens, so the pairs would have to be derived from the scores first
(0.4 s for 32,000 tokens, against 0.1 s to load this), and tokens of equal score, which merged and
extended vocabularies have by the hundred, would join in the order of the list instead of the text.
Source: T. Kudo and J. Richardson, SentencePiece (arXiv:1808.06226), BPE model.
"""

from __future__ import annotations

import heapq
import re
from functools import lru_cache

from oxillama_torch.errors import GGUFError
from oxillama_torch.tokenizer.vocab import TokenType, Vocab

__all__ = ["SPACE", "SpmEncoder"]

SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED_WORD = 32  # characters; longer words seldom come back
_MERGED_TYPES = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNDEFINED)


class SpmEncoder:
    """Encode plain text with one vocabulary.

    Args:
        vocab: a ``llama`` vocabulary with scores.

    Raises:
        GGUFError: no scores, or a byte token whose spelling is not ``<0x..>``.
    """

    def __init__(self, vocab: Vocab) -> None:
        if not vocab.scores:
            raise GGUFError("tokenizer: no merge priorities", tensor="tokenizer.ggml.scores")
        self._ids = {
            token: i
            for i, token in enumerate(vocab.tokens)
            if vocab.types[i] in _MERGED_TYPES and i not in vocab.special
        }
        self._scores = vocab.scores
        self._bytes = byte_tokens(vocab)
        self._unknown = vocab.ids.get("unknown")
        # Where no token holds a space behind another character, no merge crosses the start of a
        # word, and words can be encoded one by one.
        crossing = any(SPACE in token.lstrip(SPACE) for token in self._ids)
        self._words = None if crossing else re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")
        self._encode_short = lru_cache(maxsize=1 << 16)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        """Encode text, spaces given as spaces."""
        text = text.replace(" ", SPACE)
        ids: list[int] = []
        for word in self._words.findall(text) if self._words else (text,):
            short = len(word) <= _CACHED_WORD
            ids += self._encode_short(word) if short else self._encode_word(word)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in self._ids and len(word) == 1:
            return (self._ids[word],)
        pieces = self._merge(word)
        ids: list[int] = []
        for piece in pieces:
            token = self._ids.get(piece)
            if token is not None:
                ids.append(token)
            else:
                ids += self._fall_back(piece)
        return tuple(ids)

    def _merge(self, word: str) -> list[str]:
        """Join neighbours in the order of their score; a linked list keeps it n log n."""
        ids, scores = self._ids, self._scores
        pieces: list[str] = list(word)
        size = len(pieces)
        before, after = list(range(-1, size - 1)), list(range(1, size + 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            joined = pieces[left] + pieces[right]
            token = ids.get(joined)
            if token is not None:
                heapq.heappush(queue, (-scores[token], left, right, joined))

        for i in range(size - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            # An entry is stale when either side has changed; "" marks a piece that was joined.
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != joined:
                continue
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if before[left] >= 0:
                offer(before[left], left)
            if after[left] < size:
                before[after[left]] = left
                offer(left, after[left])
        return [piece for piece in pieces if piece]

    def _fall_back(self, piece: str) -> list[int]:
        """The bytes of a piece that is no token, or the unknown token."""
        data = piece.encode()
        if all(byte in self._bytes for byte in data):
            return [self._bytes[byte] for byte in data]
        return [] if self._unknown is None else [self._unknown]


def byte_tokens(vocab: Vocab) -> dict[int, int]:
    """Byte value -> token id, from the tokens of type BYTE.

    Raises:
        GGUFError: a byte token is not spelled ``<0x..>``.
    """
    found = {}
    for i, kind in enumerate(vocab.types):
        if kind == TokenType.BYTE:
            match = _BYTE.fullmatch(vocab.tokens[i])
            if match is None:
                raise GGUFError(
                    f"tokenizer: byte token {i} is spelled {vocab.tokens[i][:20]!r}",
                    tensor="tokenizer.ggml.tokens",
                    expected="<0x00> to <0xFF>",
                )
            found[int(match[1], 16)] = i
    return found
