"""The tokenizer's contract: special tokens, begin and end tokens, decoding, bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxillama_torch.errors import GGUFError, RequestError
from oxillama_torch.tokenizer import Tokenizer
from tests.support.tokenizer_texts import NASTY


def with_keys(metadata, **keys):
    return {**metadata, **{f"tokenizer.ggml.{k}": v for k, v in keys.items()}}


def test_special_tokens_are_parsed_only_on_request(chatml):
    text = "<|im_start|>user\nhi<|im_end|>"
    plain = chatml.encode(text)
    assert not chatml.special_ids & set(plain)
    parsed = chatml.encode(text, parse_special=True)
    start, end = map(chatml.special_id, ["<|im_start|>", "<|im_end|>"])
    assert parsed[0] == start and parsed[-1] == end and len(parsed) < len(plain)
    assert chatml.decode(plain) == chatml.decode(parsed) == text
    assert chatml.decode(parsed, skip_special=True) == "user\nhi"


def test_user_defined_tokens_are_matched_in_any_text(chatml):
    ids = chatml.encode("a<think>b")
    assert chatml.special_id("<think>") in ids
    assert chatml.decode(ids, skip_special=True) == "a<think>b"


@pytest.mark.parametrize("where", ["{}", "a{}b", " {} ", "{0}{0}", "<{}>", "x\n{}"])
def test_no_spelling_becomes_a_special_token(chatml, where):
    for token_id in chatml.special_ids:
        text = where.format(chatml.spelling(token_id))
        ids = chatml.encode(text)
        assert not chatml.special_ids & set(ids)
        assert chatml.decode(ids) == text


def test_begin_and_end_tokens(chatml_metadata):
    metadata = with_keys(chatml_metadata, bos_token_id=3, add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.encode("") == [3, tokenizer.eos_id]
    assert tokenizer.encode("", add_special=False) == []
    assert tokenizer.encode("a")[0] == 3
    written = tokenizer.spelling(3) + "a"
    assert tokenizer.encode(written, parse_special=True).count(3) == 1, "the begin token doubled"


@pytest.mark.parametrize(("key", "stem"), [("add_bos_token", "bos"), ("add_eos_token", "eos")])
def test_a_flag_without_its_token_is_refused(chatml_metadata, key, stem):
    metadata = with_keys(chatml_metadata, **{key: True})
    metadata.pop(f"tokenizer.ggml.{stem}_token_id", None)
    with pytest.raises(GGUFError, match=f"{stem}_token_id"):
        Tokenizer.from_gguf(metadata)


def test_some_vocabularies_begin_every_text_unasked(chatml_metadata):
    metadata = with_keys(chatml_metadata, pre="llama-bpe", bos_token_id=3)
    del metadata["tokenizer.ggml.add_bos_token"]
    assert Tokenizer.from_gguf(metadata).encode("a")[0] == 3


def test_suppressed_ids(chatml_metadata):
    assert Tokenizer.from_gguf(
        with_keys(chatml_metadata, suppress_tokens=[5, 7])
    ).suppressed_ids == {5, 7}


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_byte_level_text_comes_back_unchanged(chatml, text):
    assert chatml.decode(chatml.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_sentencepiece_text_comes_back_unchanged(spm_metadata, text):
    tokenizer = Tokenizer.from_gguf(spm_metadata)
    # Its space is U+2581: that character itself cannot be told from a space.
    expected = text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == expected


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(chatml, text):
    with pytest.raises(RequestError, match="surrogate"):
        chatml.encode(text)


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**63])
def test_ids_outside_the_vocabulary_are_refused(chatml, token_id):
    for call in (lambda: chatml.decode([token_id]), lambda: chatml.token_bytes(token_id)):
        with pytest.raises(RequestError, match="not in the vocabulary"):
            call()


def test_the_bytes_of_tokens_make_up_the_text(chatml):
    for text in NASTY:
        assert b"".join(map(chatml.token_bytes, chatml.encode(text))) == text.encode()


def test_fewest_tokens_is_a_lower_bound(chatml, spm_metadata):
    for tokenizer in (chatml, Tokenizer.from_gguf(spm_metadata)):
        for text in [*NASTY, "".join(NASTY), " " * 1000]:
            assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


def test_phi3_specials_swallow_the_space_behind_them(spm_metadata):
    metadata = with_keys(spm_metadata)
    metadata["general.name"] = "Phi3"
    tokens = [*spm_metadata["tokenizer.ggml.tokens"], "<|user|>"]
    metadata = with_keys(
        metadata,
        tokens=tokens,
        token_type=[*spm_metadata["tokenizer.ggml.token_type"], 3],
        scores=[*spm_metadata["tokenizer.ggml.scores"], 0.0],
    )
    tokenizer = Tokenizer.from_gguf(metadata)
    found = tokenizer.encode("<|user|>\n hello<s> a", parse_special=True, add_special=False)
    spelled = [tokenizer.spelling(i) for i in found]
    assert spelled == ["<|user|>", "▁hello", "<s>", "▁▁", "a"]


def test_a_mask_token_swallows_the_space_before_it(chatml_metadata):
    tokens = [*chatml_metadata["tokenizer.ggml.tokens"], "<mask>"]
    types = [*chatml_metadata["tokenizer.ggml.token_type"], 3]
    metadata = with_keys(chatml_metadata, pre="jina-v2-de", tokens=tokens, token_type=types)
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.encode("a  <mask> b", parse_special=True)
    assert tokenizer.decode(ids) == "a<mask> b"
