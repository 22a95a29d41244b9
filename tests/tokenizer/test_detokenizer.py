"""Streaming equals decoding at once, and never shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxillama_torch.tokenizer import Detokenizer, Tokenizer
from tests.support.tokenizer_texts import NASTY


@pytest.fixture(scope="module")
def spm(spm_metadata):
    return Tokenizer.from_gguf(spm_metadata)


@pytest.fixture(params=["chatml", "spm"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("skip_special", [False, True])
def test_every_prefix_is_a_prefix_of_the_text(tokenizer, skip_special):
    for text in NASTY:
        ids = tokenizer.encode(text)
        stream = Detokenizer(tokenizer, skip_special=skip_special, at_start=True)
        shown = ""
        whole = tokenizer.decode(ids, skip_special=skip_special)
        for token_id in ids:
            shown += stream.push(token_id)
            assert whole.startswith(shown)
        assert shown + stream.flush() == whole


@pytest.mark.parametrize("fixture", ["chatml", "spm"])
def test_any_ids_stream_to_what_they_decode_to(fixture, request):
    tokenizer = request.getfixturevalue(fixture)

    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30), st.booleans())
    def check(ids, skip_special):
        stream = Detokenizer(tokenizer, skip_special=skip_special, at_start=True)
        shown = "".join(map(stream.push, ids)) + stream.flush()
        assert shown == tokenizer.decode(ids, skip_special=skip_special)

    check()


def byte_ids(spm: Tokenizer, data: bytes) -> list[int]:
    return [3 + byte for byte in data]  # <unk>, <s>, </s>, then the 256 byte tokens


def test_a_character_shows_when_its_last_byte_has_come(spm):
    stream = Detokenizer(spm)
    shown = [stream.push(i) for i in byte_ids(spm, "é🙂€".encode())]
    assert shown == ["", "é", "", "", "", "🙂", "", "", "€"]


def test_half_a_character_shows_as_replacement_only_at_the_end(spm):
    stream = Detokenizer(spm)
    assert [stream.push(i) for i in byte_ids(spm, "🙂".encode()[:3])] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_generated_text_keeps_its_first_space(spm):
    hello = spm.encode("hello", add_special=False)
    assert Detokenizer(spm).push(hello[0]) == " hello"
    assert Detokenizer(spm, at_start=True).push(hello[0]) == "hello"


def test_several_ids_at_once_are_as_one_by_one(spm):
    ids = byte_ids(spm, "é🙂€".encode()) + spm.encode("hello", add_special=False)
    whole = "".join(map(Detokenizer(spm).push, ids))
    for cut in range(len(ids)):
        stream = Detokenizer(spm)
        assert stream.push_all(ids[:cut]) + stream.push_all(ids[cut:]) == whole
