"""The table of pre-tokenizers, against llama.cpp's fixtures and plain readings of the rules.

Set LLAMA_CPP_SOURCE to a llama.cpp source tree to compare with its vocabulary files: each
``models/ggml-vocab-*.gguf`` with texts in ``.inp`` and their ids in ``.out``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.tokenizer import Tokenizer
from oxillama_torch.tokenizer.pretokenizers import KNOWN, pre_tokenizer
from tests.support.tokenizer_texts import NASTY

FIXTURES = sorted(Path(os.environ.get("LLAMA_CPP_SOURCE", "/nowhere")).glob("models/*.gguf.inp"))


def pieces(name: str, text: str) -> list[str]:
    """The words ``text`` is cut into."""
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in KNOWN[name].patterns]
    return [word for word, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", KNOWN)
def test_every_entry_keeps_every_character(name):
    for text in [*NASTY, "".join(NASTY)]:
        assert "".join(pieces(name, text)) == text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("gpt-2", "I'LL we'll 12345  x", ["I", "'", "LL", " we", "'ll", " 12345", " ", " x"]),
        (
            "llama-bpe",
            "I'LL 12345  x\n\n y",
            ["I", "'LL", " ", "123", "45", " ", " x", "\n\n", " y"],
        ),
        ("qwen2", "a 123!\r\n", ["a", " ", "1", "2", "3", "!\r\n"]),
        ("starcoder", "x 123", ["x", " ", "1", "2", "3"]),
        ("falcon", "12345", ["123", "45"]),
        ("tekken", "HTTPServer", ["HTTPServer"]),
        ("tekken", "camelCaseWord", ["camel", "Case", "Word"]),
        ("gpt-4o", "fooBar's/\n", ["foo", "Bar's", "/\n"]),
        ("deepseek-v3", "a1234中文か,b", ["a", "123", "4", "中文か", ",b"]),
        ("deepseek-coder", "a\nb 12", ["a", "\n", "b", " ", "1", "2"]),
        ("kimi-k2", "Hello世界ok", ["Hello", "世界", "ok"]),
        ("viking", "ab, 12", ["ab", ",", " ", "1", "2"]),
        ("superbpe", "a b 1234567", ["a b ", "1", "234", "567"]),
        ("afmoe", "x 1234", ["x", " ", "1", "234"]),
        ("tiny_aya", "1234567 1234a", ["1", "234", "567", " ", "123", "4", "a"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("qwen2", "हि", ["ह", "ि"]),
        ("ufakzeka", "it's", ["it", "'s"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
    ],
)
def test_words(name, text, expected):
    assert pieces(name, text) == expected


NUMBERS = st.text(st.sampled_from("0123456789ab ,"), max_size=40)


@given(NUMBERS)
def test_groups_of_three_from_the_right_are_those_of_the_plain_expression(text):
    """The plain expressions take quadratic time, which is why the table has others."""
    groups = regex.compile(r"\d{1,3}(?=(?:\d{3})*(?!\d))")
    expected = [m.group() for m in groups.finditer(text)]
    assert [p for p in pieces("afmoe", text) if p[0].isdigit()] == expected
    assert [p for p in pieces("superbpe", text) if p[0].isdigit()] == expected
    groups = regex.compile(r"\d{1,3}(?=(?:\d{3})*\b)|\d{1,3}")
    assert [p for p in pieces("tiny_aya", text) if p[0].isdigit()] == groups.findall(text)


@pytest.mark.parametrize("name", ["no-such-pre", "", "bert-bge", "whitespace"])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.pre.*llama-bpe.*qwen2"):
        pre_tokenizer(name)


def test_a_missing_name_is_no_licence_to_guess(chatml_metadata):
    metadata = {k: v for k, v in chatml_metadata.items() if k != "tokenizer.ggml.pre"}
    with pytest.raises(UnsupportedError, match=r"without tokenizer\.ggml\.pre"):
        Tokenizer.from_gguf(metadata)


@pytest.mark.skipif(not FIXTURES, reason="LLAMA_CPP_SOURCE is not set")
@pytest.mark.parametrize("inputs", FIXTURES, ids=lambda p: p.name.split(".")[0])
def test_ids_are_llama_cpps(inputs):
    path = inputs.with_suffix("")
    with read_gguf(path) as file:
        try:
            tokenizer = Tokenizer.from_gguf(file.metadata)
        except UnsupportedError as error:
            pytest.skip(str(error)[:60])
    texts = inputs.read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) <= len(lines)
    for text, line in zip(texts, lines):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == [int(i) for i in line.split()], repr(text)
        assert tokenizer.decode(ids) == text
