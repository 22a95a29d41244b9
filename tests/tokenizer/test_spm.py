"""SentencePiece vocabularies against sentencepiece itself, and by hand.

Oracle: the ``sentencepiece`` package, where it is installed, on a model it trained here; the
hand-made cases follow llama.cpp (a space before each text and after each special token).
"""

from __future__ import annotations

import io
import random

import pytest

from oxillama_torch.errors import GGUFError
from oxillama_torch.tokenizer import Tokenizer
from tests.support.tokenizer_texts import NASTY, TRAINING


@pytest.fixture(scope="module")
def trained():
    """A model trained by sentencepiece, and a tokenizer from its pieces and scores."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TRAINING for line in text.split("\n") if line]),
        model_writer=written,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    ids = range(oracle.get_piece_size())
    kinds = [
        2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1
        for i in ids
    ]
    values = {
        "model": "llama",
        "tokens": [oracle.id_to_piece(i) for i in ids],
        "scores": [oracle.get_score(i) for i in ids],
        "token_type": kinds,
        "bos_token_id": oracle.bos_id(),
        "eos_token_id": oracle.eos_id(),
    }
    return oracle, Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in values.items()})


def test_ids_are_sentencepieces(trained):
    oracle, tokenizer = trained
    rng = random.Random(0)
    alphabet = [*" -=_aeth\n\t.", "the", "é", "中", "🙂", "▁", "def", "12"]
    mixed = [
        "".join(rng.choice(alphabet) * rng.choice([1, 1, 2, 5]) for _ in range(rng.randrange(30)))
        for _ in range(500)
    ]
    runs = ["x" + c * n for c in " -=▁a" for n in range(40)]
    for text in [*NASTY, *mixed, *runs, "".join(NASTY)]:
        if "\0" in text:  # sentencepiece takes it for the end of a string
            continue
        assert tokenizer.encode(text, add_special=False) == oracle.encode(text), repr(text)


def spellings(tokenizer: Tokenizer, text: str, **options) -> list[str]:
    return [tokenizer.spelling(i) for i in tokenizer.encode(text, **options)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["<s>"]),
        ("hello", ["<s>", "▁hello"]),
        (" hello", ["<s>", "▁▁", "hello"]),
        ("hello world", ["<s>", "▁hello", "▁world"]),
        ("   ", ["<s>", "▁▁▁▁"]),
        ("\n", ["<s>", "▁", "<0x0A>"]),
        ("é", ["<s>", "▁", "é"]),
        ("ü", ["<s>", "▁", "<0xC3>", "<0xBC>"]),
        ("<0x0A>", ["<s>", "▁", "<0x3C>", "<0x30>", "x", "<0x30>", "<0x41>", "<0x3E>"]),
        ("</s>", ["<s>", "▁", "<0x3C>", "<0x2F>", "s", "<0x3E>"]),
    ],
)
def test_by_hand(spm_metadata, text, expected):
    tokenizer = Tokenizer.from_gguf(spm_metadata)
    assert spellings(tokenizer, text) == expected
    assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


def test_a_space_goes_before_text_that_follows_a_special_token(spm_metadata):
    tokenizer = Tokenizer.from_gguf(spm_metadata)
    found = spellings(tokenizer, "hello</s>hello", parse_special=True)
    assert found == ["<s>", "▁hello", "</s>", "▁hello"]


def test_no_space_is_added_where_the_file_says_so(spm_metadata):
    metadata = {**spm_metadata, "tokenizer.ggml.add_space_prefix": False}
    tokenizer = Tokenizer.from_gguf(metadata)
    assert spellings(tokenizer, "hello world") == ["<s>", "hello", "▁world"]
    assert tokenizer.decode([*tokenizer.encode(" hello")], skip_special=True) == " hello"


def test_the_leftmost_of_equal_scores_joins_first():
    """Merged vocabularies give all added tokens one score; their order in the file is no rank."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "bc", "ab", "aa", "aaa"]
    values = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[1] * 7],
        "scores": [0.0] * len(tokens),
        "add_bos_token": False,
        "add_space_prefix": False,
    }
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in values.items()})
    assert spellings(tokenizer, "abc") == ["ab", "c"]
    assert spellings(tokenizer, "aaaaa") == ["aaa", "aa"]


def test_a_character_without_token_or_bytes_is_unknown(spm_metadata):
    kept = [i for i, kind in enumerate(spm_metadata["tokenizer.ggml.token_type"]) if kind != 6]
    metadata = dict(spm_metadata)
    for key in ("tokens", "token_type", "scores"):
        values = spm_metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = [values[i] for i in kept]
    assert spellings(Tokenizer.from_gguf(metadata), "aü") == ["<s>", "▁a", "<unk>"]


def test_scores_are_required(spm_metadata):
    metadata = {k: v for k, v in spm_metadata.items() if not k.endswith("scores")}
    with pytest.raises(GGUFError, match=r"tokenizer\.ggml\.scores"):
        Tokenizer.from_gguf(metadata)


def test_a_byte_token_with_another_spelling_is_refused(spm_metadata):
    tokens = list(spm_metadata["tokenizer.ggml.tokens"])
    tokens[3] = "<0x-1>"
    with pytest.raises(GGUFError, match="<0x-1>"):
        Tokenizer.from_gguf({**spm_metadata, "tokenizer.ggml.tokens": tokens})
