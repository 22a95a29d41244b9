"""Byte-level BPE from metadata against HuggingFace tokenizers trained here.

Oracle: the trained ``tokenizers.Tokenizer`` that the metadata was exported from, which applies the
model's own regular expression, written out here a second time.
"""

from __future__ import annotations

import pytest

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.tokenizer import Tokenizer
from tests.support.tokenizer_texts import NASTY, QWEN2, gguf_metadata

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = {
    "gpt-2": (GPT2, False),
    "qwen2": (QWEN2, False),
    "llama-bpe": (LLAMA3, True),
    "tekken": (TEKKEN, True),
}


@pytest.mark.parametrize("pre", KINDS)
def test_ids_are_those_of_the_tokenizer_the_file_came_from(train_bpe, pre):
    pattern, ignore_merges = KINDS[pre]
    oracle, metadata = train_bpe(pattern, pre, ignore_merges)
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in [*NASTY, "".join(NASTY), "\n".join(NASTY)]:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == oracle.encode(text).ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_a_word_that_is_a_token_is_taken_whole_only_where_merges_are_ignored():
    letters = ["a", "b", "c", "ab", "bc", "abc"]
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    types = [1] * 6 + [3]
    for pre, expected in (("llama-bpe", [5]), ("qwen2", [0, 4])):
        tokenizer = Tokenizer.from_gguf(gguf_metadata([*letters, "<eos>"], types, merges, pre))
        assert tokenizer.encode("abc", add_special=False) == expected


def test_text_cannot_merge_into_a_special_token():
    """A file whose merges spell its end token: the merge is dropped, the text stays text."""
    tokens = ["e", "o", "t", "eo", "eot"]
    metadata = gguf_metadata(tokens, [1, 1, 1, 1, 3], [("e", "o"), ("eo", "t")], "qwen2")
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("eot", add_special=False) == [3, 2]
    assert tokenizer.encode("eot", add_special=False, parse_special=True) == [4]


def test_a_merge_of_what_is_no_token_is_named():
    metadata = gguf_metadata(["a", "b", "<eos>"], [1, 1, 3], [("a", "b")], "qwen2")
    with pytest.raises(GGUFError, match=r"'ab', not a token.*tokenizer\.ggml\.merges"):
        Tokenizer.from_gguf(metadata)


def test_merges_are_required():
    metadata = gguf_metadata(["a", "<eos>"], [1, 3], [], "qwen2")
    with pytest.raises(GGUFError, match="no merges"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "none", "no_vocab"])
def test_other_tokenizer_models_are_refused_by_name(chatml_metadata, model):
    with pytest.raises(UnsupportedError, match=f"{model}.*gpt2, llama"):
        Tokenizer.from_gguf({**chatml_metadata, "tokenizer.ggml.model": model})


def test_spaces_become_lines_below_and_rare_letters_bytes_in_gemma4_vocabularies():
    tokens = ["<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "▁a", "\n", "\n\n", "<eos>"]
    types = [6, 6, 6, 1, 1, 1, 1, 1, 3]
    merges = [("▁", "a"), ("\n", "\n")]
    metadata = gguf_metadata(tokens, types, merges, "", model="gemma4", bos_token_id=8)
    del metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("a aé\n\n") == [8, 4, 5, 1, 2, 7]
    assert tokenizer.decode([4, 5, 1, 2, 7]) == "a aé\n\n"
