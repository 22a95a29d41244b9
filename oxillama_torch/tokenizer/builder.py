"""A checked vocabulary becomes an encoder of plain text.

Byte-level BPE runs in HuggingFace's ``tokenizers``; SentencePiece-BPE in ``spm.py``. Special
tokens are left out of both on purpose: no text can merge into one. Matching their spellings, where
that is wanted, is ``tokenizer.py``'s part.
"""

from __future__ import annotations

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.tokenizer.pretokenizers import PreTokenizer, pre_tokenizer
from oxillama_torch.tokenizer.spm import SPACE, SpmEncoder
from oxillama_torch.tokenizer.vocab import Vocab

__all__ = ["BYTE_OF_LETTER", "MODELS", "BpeEncoder", "Encoder", "build_encoder", "uses_pre"]

MODELS = ("gpt2", "llama", "gemma4")


def _letters() -> dict[str, int]:
    """GPT-2's alphabet: a printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _letters()


class BpeEncoder:
    """Encode plain text with merges.

    Args:
        vocab: a ``gpt2`` or ``gemma4`` vocabulary.
        pre: how it cuts text into words.

    Raises:
        GGUFError: no merges, or a merge of tokens that the vocabulary does not hold.
    """

    def __init__(self, vocab: Vocab, pre: PreTokenizer) -> None:
        self._tokenizer = build_bpe(vocab, pre)

    def encode(self, text: str) -> list[int]:
        """Encode text."""
        # encode() holds the interpreter's lock until it is done, three seconds for 4 MB, and the
        # batching thread with it; the batch call gives the lock up.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


Encoder = BpeEncoder | SpmEncoder


def uses_pre(vocab: Vocab) -> PreTokenizer | None:
    """The pre-tokenizer of a vocabulary; None where its model has none.

    Raises:
        UnsupportedError: an unknown pre-tokenizer, or a model other than those in ``MODELS``.
    """
    if vocab.model not in MODELS:
        raise UnsupportedError(f"tokenizer model {vocab.model!r} (tokenizer.ggml.model)", MODELS)
    if vocab.model == "llama":
        return None
    return pre_tokenizer("gemma4" if vocab.model == "gemma4" else vocab.pre)


def build_encoder(vocab: Vocab, pre: PreTokenizer | None) -> Encoder:
    """Build the encoder for a vocabulary and what ``uses_pre`` says of it."""
    return SpmEncoder(vocab) if pre is None else BpeEncoder(vocab, pre)


def build_bpe(vocab: Vocab, pre: PreTokenizer) -> tokenizers.Tokenizer:
    """Build a ``tokenizers.Tokenizer`` that knows no special tokens.

    Args:
        vocab: tokens and merges.
        pre: words, byte alphabet, and whether merges are skipped for whole words.
    """
    if not vocab.merges:
        raise GGUFError("tokenizer: no merges", tensor="tokenizer.ggml.merges")
    text_ids = {t: i for i, t in enumerate(vocab.tokens) if i not in vocab.special}
    merges = [pair for pair in vocab.merges if _is_text(pair, text_ids, vocab)]
    model = models.BPE(
        vocab=text_ids,
        merges=merges,
        ignore_merges=pre.ignore_merges,
        byte_fallback=not pre.byte_level,
    )
    tokenizer = tokenizers.Tokenizer(model)
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
    if pre.byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer


def _is_text(pair: tuple[str, str], text_ids: dict[str, int], vocab: Vocab) -> bool:
    """Whether a merge stays among text tokens; one with a special token is dropped.

    Raises:
        GGUFError: a part or the result is no token at all.
    """
    parts = (pair[0], pair[1], pair[0] + pair[1])
    if all(part in text_ids for part in parts):
        return True
    known = set(vocab.tokens)
    for part in parts:
        if part not in known:
            raise GGUFError(
                f"tokenizer: merge {' '.join(pair)[:60]!r} speaks of {part[:40]!r}, not a token",
                tensor="tokenizer.ggml.merges",
            )
    return False
