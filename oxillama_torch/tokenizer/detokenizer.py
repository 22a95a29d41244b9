"""Token ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Decode ids as they come: all ``push`` and the ``flush`` together equal one ``decode``.

    Args:
        tokenizer: the model's tokenizer.
        skip_special: leave special tokens out.
        at_start: the ids begin a text, so that the space some vocabularies put before a text is
            dropped as ``Tokenizer.decode`` does. Generated ids continue a prompt: theirs stays.
    """

    __slots__ = (
        "_at_boundary", "_decoder", "_drop_space", "_skip_special", "_texts", "_tokenizer",
    )  # fmt: skip

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = False, at_start: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._drop_space = at_start and tokenizer.adds_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._texts = tokenizer.texts
        # Whether a token's text depends on nothing before it.
        self._at_boundary = not self._drop_space

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, often a part of it or none.

        Raises:
            RequestError: the id is outside the vocabulary.
        """
        if self._at_boundary:
            text = self._texts[token_id]
            if text is not None:
                return text
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.special_ids:
            data = b"" if self._skip_special else data
        elif self._drop_space:
            data = data.removeprefix(b" ")
            self._drop_space = False
        text = self._decoder.decode(data)
        pending, _ = self._decoder.getstate()
        self._at_boundary = not (pending or self._drop_space)
        return text

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Take several ids at once, as ``push`` one by one."""
        if self._at_boundary:
            texts = [self._texts[token_id] for token_id in token_ids]
            if None not in texts:
                return "".join(texts)
        return "".join(map(self.push, token_ids))

    def flush(self) -> str:
        """Return what is left: U+FFFD where the ids ended inside a character."""
        return self._decoder.decode(b"", final=True)
