"""Text to token ids and back, as a GGUF file's metadata defines it.

A text is first cut at the spellings of tokens that are matched whole (see ``encode``); what lies
between goes through the encoder. Special tokens are not part of the encoder's vocabulary, so no
text becomes one unless ``parse_special`` asks for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from oxillama_torch.errors import GGUFError, RequestError
from oxillama_torch.tokenizer.builder import BYTE_OF_LETTER, build_encoder, uses_pre
from oxillama_torch.tokenizer.spm import SPACE, byte_tokens
from oxillama_torch.tokenizer.vocab import TokenType, Vocab, read_vocab

__all__ = ["Tokenizer"]


class _Texts(dict[int, str | None]):
    """See ``Tokenizer.texts``; filled as tokens are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        data = self._tokenizer.token_bytes(token_id)
        text = None
        if token_id not in self._tokenizer.special_ids:
            with contextlib.suppress(UnicodeDecodeError):
                text = data.decode()
        self[token_id] = text
        return text


class Tokenizer:
    """The tokenizer of one model.

    Args:
        vocab: its checked vocabulary; usually made by :meth:`from_gguf`.

    Attributes:
        vocab_size: number of token ids.
        bos_id, eos_id: begin and end token, or None.
        eos_ids: every id that ends a generation.
        special_ids: ids that text never becomes without ``parse_special``.
        special_tokens: spellings by the names templates use: ``bos_token``, ``eos_token``, ...
        texts: by its id, the text of each token that always stands for the same one; None for
            special tokens and parts of characters. An id outside the vocabulary: RequestError.
        suppressed_ids: ids the model must not sample.
        adds_space: whether a space is put before every text (SentencePiece vocabularies).
        add_bos, add_eos: whether ``encode(add_special=True)`` adds them.

    Raises:
        GGUFError: a flag asks for a token that the file does not name.
        UnsupportedError: a tokenizer model or pre-tokenizer this build does not know.
    """

    def __init__(self, vocab: Vocab) -> None:
        pre = uses_pre(vocab)
        self._vocab = vocab
        self._spm = pre is None
        self._byte_level = pre is not None and pre.byte_level
        self._encoder = build_encoder(vocab, pre)
        self._byte_of = {i: byte for byte, i in byte_tokens(vocab).items()}
        self._bytes: dict[int, bytes] = {}
        self.texts = _Texts(self)
        self.adds_space = self._spm and vocab.add_space_prefix is not False

        self.vocab_size = len(vocab.tokens)
        self.bos_id, self.eos_id = vocab.ids.get("bos"), vocab.ids.get("eos")
        self.eos_ids, self.special_ids = vocab.end, vocab.special
        self.suppressed_ids = vocab.suppressed
        self.special_tokens = {
            f"{stem}_token": vocab.tokens[vocab.ids[key]]
            for stem, key in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if key in vocab.ids
        }
        default_bos = self._spm or pre.add_bos
        self.add_bos = self._checked("bos", vocab.add_bos, default_bos)
        self.add_eos = self._checked("eos", vocab.add_eos, False)

        # A token swallows white space without bound where it trims, so nothing can be said then.
        self._longest = max(map(len, vocab.tokens)) if not vocab.trims_right else 1 << 62
        self._id_of = {vocab.tokens[i]: i for i in vocab.literal | vocab.special}
        left = pre.left_strip if pre else ()
        self._literals = self._matcher(vocab.literal, left)
        self._all_spellings = self._matcher(vocab.literal | vocab.special, left)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer that ``tokenizer.ggml.*`` describes.

        Args:
            metadata: as ``GGUFFile.metadata``.

        Raises:
            GGUFError: metadata that contradicts itself, naming the key.
            UnsupportedError: a tokenizer this build does not know.
        """
        return cls(read_vocab(metadata))

    def encode(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = False,
        stand_ins: Mapping[int, str] | None = None,
        at_start: bool = True,
    ) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text without lone surrogates.
            add_special: add the begin and end tokens the model wants. A begin token that
                ``text`` already spells (with ``parse_special``) is not doubled.
            parse_special: let spellings of special tokens become those tokens. Leave it off for
                text that a user wrote.
            stand_ins: characters that stand for others while special tokens are looked for, as
                ``str.translate`` wants them: what they spell never is a special token.
            at_start: the text begins here. One that goes on from another gets no space before it.

        Raises:
            RequestError: ``text`` holds a lone surrogate, which has no UTF-8.
        """
        ids: list[int] = []
        follows_special = at_start
        for piece in self._pieces(text, parse_special, stand_ins):
            if isinstance(piece, int):
                ids.append(piece)
                follows_special = True
                continue
            try:
                piece.encode()
            except UnicodeEncodeError:
                raise RequestError("the text holds a lone surrogate", param="text") from None
            prefix = " " if self.adds_space and follows_special else ""
            ids += self._encoder.encode(prefix + piece)
            follows_special = False
        if add_special and self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of ``len(encode(text))``, to refuse a hopeless text before encoding it."""
        return len(text) // self._longest

    def check_fits(self, texts: str | Iterable[str], max_tokens: int, param: str) -> None:
        """Refuse texts that together cannot have ``max_tokens`` or fewer, without encoding them.

        Raises:
            RequestError: names ``param``.
        """
        texts = [texts] if isinstance(texts, str) else texts
        fewest = sum(map(self.fewest_tokens, texts))
        if fewest > max_tokens:
            raise RequestError(
                f"This model's maximum context length is {max_tokens} tokens. "
                f"However, your prompt has {fewest} or more.",
                code="context_length_exceeded",
                param=param,
            )

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turn token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids, taken as a text from its beginning: the space that some vocabularies
                put before a text is dropped.
            skip_special: leave special tokens out.

        Raises:
            RequestError: an id outside the vocabulary.
        """
        data = bytearray()
        at_start = self.adds_space
        for i in ids:
            if i in self.special_ids:
                data += b"" if skip_special else self.token_bytes(i)
                continue
            piece = self.token_bytes(i)
            data += piece.removeprefix(b" ") if at_start else piece
            at_start = False
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes one token stands for; may be a part of a character.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._token_bytes(token_id)
        return data

    def spelling(self, token_id: int) -> str:
        """The token as the file spells it (``Ġthe``, ``▁the``, ``<|im_end|>``)."""
        self._check_id(token_id)
        return self._vocab.tokens[token_id]

    def special_id(self, spelling: str) -> int | None:
        """The id of a special or user-defined token with this spelling, or None."""
        return self._id_of.get(spelling)

    def _token_bytes(self, token_id: int) -> bytes:
        self._check_id(token_id)
        text, kind = self._vocab.tokens[token_id], self._vocab.types[token_id]
        if token_id in self._byte_of:
            return bytes([self._byte_of[token_id]])
        if token_id in self.special_ids or kind == TokenType.USER_DEFINED:
            return text.encode()
        if not self._byte_level:
            return text.replace(SPACE, " ").encode()
        if all(letter in BYTE_OF_LETTER for letter in text):
            return bytes(BYTE_OF_LETTER[letter] for letter in text)
        return text.encode()

    def _pieces(
        self, text: str, parse_special: bool, stand_ins: Mapping[int, str] | None
    ) -> Iterator[str | int]:
        """Cut text into plain pieces and the ids of tokens matched by their spelling."""
        matcher = self._all_spellings if parse_special else self._literals
        for piece in self._cut(text, matcher):
            if stand_ins and isinstance(piece, str):
                yield from self._cut(piece.translate(stand_ins), self._literals)
            else:
                yield piece

    def _cut(self, text: str, matcher: re.Pattern[str] | None) -> Iterator[str | int]:
        end = 0
        for match in matcher.finditer(text) if matcher else ():
            if match.start() > end:
                yield text[end : match.start()]
            yield self._id_of[match[match.lastindex or 0]]
            end = match.end()
        if end < len(text):
            yield text[end:]

    def _matcher(self, ids: Iterable[int], left_strip: tuple[str, ...]) -> re.Pattern[str] | None:
        """One expression for the spellings, the longest first; a group where space is swallowed."""
        spellings = sorted((self._vocab.tokens[i] for i in ids), key=len, reverse=True)
        # In Phi-3's vocabulary all but three tokens swallow the space after them.
        kept = {"<s>", "<unk>", "<|endoftext|>"}
        choices = []
        for spelling in spellings:
            escaped = re.escape(spelling)
            if spelling in left_strip:
                escaped = rf"\s*({escaped})"
            elif self._vocab.trims_right and spelling not in kept:
                escaped = rf"({escaped})\s*"
            choices.append(escaped)
        return re.compile("|".join(choices)) if choices else None

    def _checked(self, stem: str, flag: bool | None, default: bool) -> bool:
        wanted = default if flag is None else flag
        if wanted and stem not in self._vocab.ids:
            raise GGUFError(
                f"tokenizer: every text starts or ends with the {stem} token, which is not named",
                tensor=f"tokenizer.ggml.{stem}_token_id",
            )
        return wanted

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(
                f"token id {token_id} is not in the vocabulary (0 to {self.vocab_size - 1})"
            )
