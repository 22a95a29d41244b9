"""Metadata that contradicts itself is named; tokens are sorted into special, literal and end."""

from __future__ import annotations

import numpy as np
import pytest

from oxillama_torch.errors import GGUFError
from oxillama_torch.tokenizer.vocab import read_vocab
from tests.support.tokenizer_texts import gguf_metadata


def vocabulary(*special: str, kind: int = 3, **extra):
    tokens = ["a", "b", "ab", *special]
    types = [1, 1, 1] + [kind] * len(special)
    metadata = gguf_metadata(tokens, types, [("a", "b")], "qwen2", **extra)
    if "eos_token_id" not in extra:
        del metadata["tokenizer.ggml.eos_token_id"]
    return metadata


BAD = {
    "model": [None, 3, ""],
    "pre": [7],
    "tokens": [None, "abc", [], ["a", 1], ["a", "a", "b"]],
    "token_type": [[1, 1], [1, 1, 1, 9], [1, 1, 1, True], "x"],
    "scores": [[0.0], [0.0, 0.0, 0.0, float("nan")], ["a", "b", "c", "d"]],
    "merges": [["ab"], ["a "], [3], 5],
    "bos_token_id": [-1, 4, 2**32 - 1, "0", 1.5, True],
    "eos_token_id": [4],
    "eot_token_id": [99],
    "padding_token_id": [99],
    "add_bos_token": [1, "true"],
    "add_space_prefix": [0],
    "suppress_tokens": [[0, 4], 3],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_bad_metadata_is_refused_by_key(key, value):
    metadata = vocabulary("<eos>")
    metadata[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(GGUFError) as caught:
        read_vocab(metadata)
    assert caught.value.tensor == f"tokenizer.ggml.{key}"


def test_numpy_arrays_and_scalars_are_what_readers_give():
    metadata = vocabulary("<eos>", eos_token_id=np.uint32(3), add_bos_token=np.bool_(False))
    metadata["tokenizer.ggml.token_type"] = np.array([1, 1, 1, 3], np.int32)
    metadata["tokenizer.ggml.scores"] = np.zeros(4, np.float32)
    vocab = read_vocab(metadata)
    assert vocab.ids == {"eos": 3} and vocab.end == {3} and vocab.add_bos is False
    assert all(type(kind) is int for kind in vocab.types)


@pytest.mark.parametrize("key", ["eos", "eot", "eom"])
def test_every_named_end_token_ends_a_generation(key):
    vocab = read_vocab(vocabulary("<stop-here>", **{f"{key}_token_id": 3}))
    assert vocab.end == {3} and vocab.special == {3}


@pytest.mark.parametrize(
    "name",
    ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"]
    + ["</s>", "<|return|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[EOT]", "<|fim_pad|>"],
)
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_well_known_end_tokens_end_a_generation_whatever_their_type(name, kind):
    vocab = read_vocab(vocabulary(name, kind=kind))
    assert vocab.end == {3} and 3 in vocab.special


def test_text_that_merges_build_is_no_end_token():
    metadata = gguf_metadata(
        ["<", "/", "s", ">", "</", "s>", "</s>"],
        [1] * 7,
        [("<", "/"), ("s", ">"), ("</", "s>")],
        "qwen2",
    )
    del metadata["tokenizer.ggml.eos_token_id"]
    assert read_vocab(metadata).end == frozenset()


def test_end_of_a_part_is_not_the_end_where_calls_exist():
    """gpt-oss closes each channel with <|end|>; <|return|> and <|call|> end the turn."""
    vocab = read_vocab(vocabulary("<|end|>", "<|return|>", "<|call|>", eos_token_id=4))
    assert vocab.end == {4, 5}
    assert vocab.special == {3, 4, 5}


def test_user_defined_tokens_are_literal_unless_they_look_like_role_markers():
    names = ["<think>", "    ", "<|user|>", "<｜Assistant｜>", "[PAD151700]", "<start_of_turn>"]
    vocab = read_vocab(vocabulary(*names, kind=4))
    assert {vocab.tokens[i] for i in vocab.literal} == {"<think>", "    "}
    assert {vocab.tokens[i] for i in vocab.special} == set(names[2:])


def test_ids_missing_in_sentencepiece_files_have_its_defaults(spm_metadata):
    metadata = {k: v for k, v in spm_metadata.items() if not k.endswith("_token_id")}
    assert read_vocab(metadata).ids == {"bos": 1, "eos": 2, "unknown": 0}


def test_empty_spellings_are_made_distinct():
    assert read_vocab(vocabulary("", "<eos>")).tokens[3] == "[EMPTY_3]"
