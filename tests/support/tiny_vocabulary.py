"""A small byte-level BPE vocabulary with ChatML special tokens, for tiny test models."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import gguf
import tokenizers

__all__ = ["CHATML", "TinyVocabulary", "tiny_vocabulary"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_MERGES = 130
_TEXT = """
The tokenizer of a tiny model reads this text and learns which bytes stand together often. A model
that is asked a question answers with words, numbers such as 1, 23 and 456, and lines of code:
def dedent(text, prefix=None): return "".join(line.lstrip() for line in text.splitlines(True))
for index, value in enumerate(values): print(index, value, sum(values[:index]))
Attention is computed over pages of keys and values; positions are rotated, rows are normalised, and
the logits of the last position decide which token follows. Straße, naïve, déjà vu, 数据, emoji 🙂.
"""


@dataclass(frozen=True)
class TinyVocabulary:
    """Tokens in order of their ids (specials last), merges in order of rank, and the oracle.

    ``tokenizer`` encodes plain text as the files' vocabulary asks for; it knows no specials.
    """

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    tokenizer: tokenizers.Tokenizer

    def id(self, token: str) -> int:
        return self.tokens.index(token)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer keys of a GGUF file."""
        special = {self.id(token) for token in SPECIAL_TOKENS}
        types = [
            gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL
            for index in range(len(self.tokens))
        ]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(types)
        writer.add_token_merges(list(self.merges))
        writer.add_eos_token_id(self.id("<|im_end|>"))
        writer.add_pad_token_id(self.id("<|endoftext|>"))
        writer.add_add_bos_token(False)
        writer.add_chat_template(CHATML)


@functools.cache
def tiny_vocabulary() -> TinyVocabulary:
    """256 bytes, 130 merges and three special tokens: 389 ids, no multiple of any tile."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + _MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    # a token of the vocabulary arises from the merge of two earlier ones; the file names the pair
    merges = [" ".join(pair) for pair in _merge_pairs(tokenizer)]
    assert len(merges) == _MERGES, f"the text yields {len(merges)} merges, not {_MERGES}"
    return TinyVocabulary((*tokens, *SPECIAL_TOKENS), tuple(merges), tokenizer)


def _merge_pairs(tokenizer: tokenizers.Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
