"""Small vocabularies as GGUF metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from oxillama_torch.tokenizer import Tokenizer
from tests.support.tokenizer_texts import CONTROL, QWEN2, TRAINING, gguf_metadata


@pytest.fixture(scope="session")
def train_bpe() -> Callable[[str], tuple[tokenizers.Tokenizer, dict[str, Any]]]:
    """Train a byte-level BPE with one expression: the oracle, and the same as GGUF metadata."""

    def train(pattern: str, pre: str, ignore_merges: bool = False):
        oracle = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
        oracle.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        oracle.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        oracle.train_from_iterator(TRAINING, trainer)
        vocab = oracle.get_vocab()
        tokens = sorted(vocab, key=vocab.get)
        merges = [tuple(m) for m in _merges(oracle)]
        types = [1] * len(tokens) + [3] * len(CONTROL)
        return oracle, gguf_metadata(tokens + CONTROL, types, merges, pre)

    return train


def _merges(oracle: tokenizers.Tokenizer) -> list[list[str]]:
    merges = json.loads(oracle.to_str())["model"]["merges"]
    return [m.split(" ") if isinstance(m, str) else m for m in merges]


@pytest.fixture(scope="session")
def chatml_metadata(train_bpe) -> dict[str, Any]:
    """A small vocabulary with ChatML's special tokens and a user-defined ``<think>``."""
    _, metadata = train_bpe(QWEN2, "qwen2")
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"] + ["<think>", "</think>"]
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [4, 4]
    metadata["tokenizer.ggml.eos_token_id"] = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")
    return metadata


@pytest.fixture(scope="session")
def chatml(chatml_metadata) -> Tokenizer:
    return Tokenizer.from_gguf(chatml_metadata)


@pytest.fixture(scope="session")
def spm_metadata() -> dict[str, Any]:
    """A hand-made SentencePiece vocabulary: 256 byte tokens, letters, and a few words."""
    words = ["▁", "▁▁", "▁▁▁▁", "he", "ll", "hell", "hello", "▁hello", "wo", "▁wo", "rld", "ld"]
    words += ["▁world", "world", "▁a", "aa", "aaa", "é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    scores = [0.0] * len(tokens)
    for rank, word in enumerate([*words, *"abcdefghijklmnopqrstuvwxyz.,!?"]):
        tokens.append(word)
        types.append(1)
        scores.append(-float(rank))
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}
