"""Compiling constraints: vocabularies, limits, the bound of what is kept, and masks.

Oracles: the vocabulary's own bytes, Python's ``re``, and the process table.
"""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import torch

from oxillama_torch.config import demo_model_path
from oxillama_torch.errors import CapacityError, RequestError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.sampling import mask
from oxillama_torch.sampling.constraint import MAX_SOURCE, Constraint
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler, ConstraintLimits
from oxillama_torch.sampling.mask import MaskFiller
from oxillama_torch.tokenizer.tokenizer import Tokenizer


class Vocabulary:
    """Bytes, some words, an end token, and what vocabularies have to try a library with."""

    def __init__(self, *, ends=True) -> None:
        self.texts = [bytes([byte]) for byte in range(256)]
        self.texts += [b"ab", b"abc", b"ab", b"", b"\xffz", b"<|end|>", b"<|call|>", b"aa"]
        self.vocab_size = len(self.texts)
        end, call, suppressed = (self.texts.index(t) for t in (b"<|end|>", b"<|call|>", b"aa"))
        self.special_ids = frozenset({end, call})
        self.eos_ids = frozenset({end}) if ends else frozenset()
        self.suppressed_ids = frozenset({suppressed})

    def token_bytes(self, token_id: int) -> bytes:
        return self.texts[token_id]

    def encode(self, text: str, *, add_special: bool, at_start: bool) -> list[int]:
        return list(text.encode())


@pytest.fixture
def compiler():
    made = []

    def make(vocabulary=None, **limits) -> ConstraintCompiler:
        made.append(ConstraintCompiler(vocabulary or Vocabulary(), ConstraintLimits(**limits)))
        return made[-1]

    yield make
    for compiler in made:
        compiler.close()


def allowed(matcher, vocab_size: int) -> set[int]:
    """Tokens that the mask leaves."""
    masks = MaskFiller(vocab_size, torch.device("cpu")).start([None, matcher])
    masked, errors = masks.apply(torch.zeros(2, vocab_size))
    assert not errors and (masked[0] == 0).all()
    return set(masked[1].isfinite().nonzero()[:, 0].tolist())


def ids(vocabulary, *texts) -> set[int]:
    return {i for i, text in enumerate(vocabulary.texts) if text in texts}


def test_masks_are_the_tokens_that_can_come(compiler):
    vocabulary = Vocabulary()
    matcher = compiler(vocabulary).matcher(Constraint("regex", "a*b?c?"))
    end = ids(vocabulary, b"<|end|>")
    # Both tokens of the same bytes, and not the one that the model must not choose.
    assert allowed(matcher, 300) == ids(vocabulary, b"a", b"ab", b"abc", b"b", b"c") | end
    matcher.accept(vocabulary.texts.index(b"ab"))
    assert allowed(matcher, vocabulary.vocab_size) == ids(vocabulary, b"c") | end
    matcher.accept(ord("c"))
    assert matcher.complete and matcher.error is None


def test_special_tokens_are_no_text(compiler):
    vocabulary = Vocabulary()
    anything = compiler(vocabulary).matcher(Constraint("regex", "(.|\n)*"))
    found = allowed(anything, vocabulary.vocab_size)
    assert not found & ids(vocabulary, b"<|call|>", b"", b"\xffz", b"\xff")
    named = compiler(vocabulary).matcher(Constraint("lark", 'start: <|call|> "a"'))
    assert allowed(named, vocabulary.vocab_size) == ids(vocabulary, b"<|call|>")


def test_a_vocabulary_without_an_end_token(compiler):
    vocabulary = Vocabulary(ends=False)
    matcher = compiler(vocabulary).matcher(Constraint("regex", "[ab]*"))
    found = allowed(matcher, vocabulary.vocab_size + 40)
    assert found == ids(vocabulary, b"a", b"b", b"ab"), "nothing stands beyond the vocabulary"


def test_ignoring_the_end_as_long_as_something_else_can_come(compiler):
    vocabulary = Vocabulary()
    matcher = compiler(vocabulary).matcher(Constraint("regex", "a*"), goes_on=True)
    assert allowed(matcher, vocabulary.vocab_size) == ids(vocabulary, b"a")


def test_many_rows_at_once_equal_one_by_one(compiler):
    vocabulary = Vocabulary()
    compiler = compiler(vocabulary)
    sources = ["a+", "b(a|c)", "[0-9]{3}", "abc?"]
    matchers = [compiler.matcher(Constraint("regex", source)) for source in sources]
    masks = MaskFiller(280, torch.device("cpu")).start(matchers)
    together, _ = masks.apply(torch.zeros(4, 280))
    for row, matcher in zip(together, matchers):
        assert set(row.isfinite().nonzero()[:, 0].tolist()) == allowed(matcher, 280)


@pytest.mark.parametrize("spm", [False, True])
def test_forced_tokens_are_what_the_tokenizer_makes(compiler, spm):
    """With the demo model's vocabulary; a SentencePiece one puts spaces before texts."""
    with read_gguf(demo_model_path()) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
    tokenizer.adds_space = spm
    matcher = compiler(tokenizer).matcher(Constraint("regex", "return the length of the list!"))
    forced = matcher.forced()
    text = "return the length of the list!"
    assert forced and text.startswith(tokenizer.decode(forced)) and len(forced) < len(text) / 2
    tokenizer.adds_space = False
    assert forced == tokenizer.encode(text, add_special=False)[: len(forced)]


def test_equal_constraints_are_compiled_once(compiler):
    compiler = compiler()
    asked = []
    compiler.matcher(Constraint("regex", "a"))
    pool = compiler._pool
    ask, pool.ask = pool.ask, lambda request: asked.append(request) or ask(request)
    compiler.matcher(Constraint("regex", "a", "other name"))
    assert not asked
    compiler.matcher(Constraint("regex", "b"))
    assert len(asked) == 1


def test_what_is_kept_is_bounded(compiler):
    compiler = compiler(cache_bytes=4 << 20)
    for number in range(40):
        compiler.matcher(Constraint("regex", f"a{{{number}}}"))
    assert compiler._kept_bytes <= 4 << 20 and 1 < len(compiler._compiled) < 20
    sizes = [size for _, size in compiler._compiled.values()]
    assert sum(sizes) == compiler._kept_bytes


def test_matchers_of_one_constraint_are_independent(compiler):
    compiler = compiler()
    first, second = (compiler.matcher(Constraint("regex", "ab")) for _ in range(2))
    first.accept(ord("a"))
    assert allowed(first, 264) != allowed(second, 264)


def test_sources_are_bounded():
    with pytest.raises(RequestError, match="at most"):
        Constraint("regex", "a" * (MAX_SOURCE + 1))
    with pytest.raises(RequestError, match="none of"):
        Constraint("yaml", "a")
    with pytest.raises(RequestError, match="surrogate"):
        Constraint("regex", "\ud800")


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint("regex", "(?=a)b"), "look-around"),
        (Constraint("regex", "a("), "unclosed group"),
        (Constraint("lark", "start: missing"), "unknown name"),
        (Constraint("lark", "start: <|nothing|>"), "unknown special token"),
        (Constraint("lark", 'start: %json {"not": {}}'), "'not' is not supported"),
        (Constraint("lark", 'start: %json {"x-guidance": {"lenient": true}}'), "may have"),
        (Constraint("lark", "start: @other\n%import common.X"), "is not supported"),
        (Constraint("choice", "[]"), "between 1 and"),
        (Constraint("choice", "{}"), "list of strings"),
        (Constraint("choice", "["), "not a valid JSON"),
        (Constraint("json_schema", "{"), "not a valid JSON"),
        (Constraint("json_schema", "false"), "Unsatisfiable"),
        (Constraint("json_schema", '{"$ref": "#"}'), "no text at all"),
        (Constraint("json_schema", '{"minimum": 1e999}'), "not a valid JSON"),
    ],
)
def test_refusals_say_why(compiler, constraint, message):
    with pytest.raises(RequestError, match=message) as caught:
        compiler().matcher(constraint)
    assert caught.value.status == 400 and caught.value.param.startswith("constraint")


HOSTILE = {
    "stack": Constraint(
        "lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(9000)) + 'r9000: "a"'
    ),
    "time": Constraint.json_schema(
        {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(5, 40)]}
    ),
    "memory": Constraint.json_schema({"type": "integer", "multipleOf": 1_000_003}),
    "mask": Constraint("regex", "a{1000000000}"),
    "items": Constraint("lark", "start: " + " | ".join(f'"a{i}" start' for i in range(6000))),
    "branches": Constraint.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"{k}{i}": {}}} for k in "ab"]} for i in range(24)]}
    ),
}


def test_hostile_constraints_are_refused_and_the_next_is_served(compiler):
    compiler = compiler()
    compiler.matcher(Constraint("regex", "a"))
    for name, constraint in HOSTILE.items():
        started = time.process_time()
        with pytest.raises(RequestError) as caught:
            compiler.matcher(constraint)
        assert caught.value.status == 400, name
        # What it costs this process, where others are served.
        assert time.process_time() - started < 0.5, name
    assert compiler.matcher(Constraint("regex", "b+")).error is None


def test_other_threads_run_on_while_one_compiles(compiler):
    compiler = compiler()
    compiler.matcher(Constraint("regex", "a"))
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(RequestError):
        compiler.matcher(HOSTILE["time"])
    done.set()
    thread.join()
    assert len(ticks) > 50


def test_a_closed_compiler_refuses(compiler):
    compiler = compiler()
    compiler.matcher(Constraint("regex", "a"))
    compiler.close()
    with pytest.raises(CapacityError):
        compiler.matcher(Constraint("regex", "b"))


def test_choices_of_every_kind_of_text(compiler):
    texts = ['say "no"', "a\\b", "line\nbreak", "tab\t", "é🙂", "a", "ab", ""]
    vocabulary = Vocabulary()
    compiler = compiler(vocabulary)
    for text in texts:
        matcher = compiler.matcher(Constraint.choice(texts))
        for byte in text.encode():
            assert byte in allowed(matcher, vocabulary.vocab_size)
            matcher.accept(byte)
        ends = allowed(matcher, vocabulary.vocab_size) & vocabulary.eos_ids
        assert matcher.complete or ends, text


def test_restricting_a_mask_in_place(compiler):
    vocabulary = Vocabulary()
    matcher = compiler(vocabulary).matcher(Constraint("regex", "a"))
    row = np.ones(300, np.uint8)
    matcher.restrict(row)
    assert row[: vocabulary.vocab_size].all() and not row[vocabulary.vocab_size :].any()


def test_plain_data():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    constraint = Constraint.json_schema(schema, "here")
    assert json.loads(constraint.source) == schema
    assert constraint == Constraint("json_schema", constraint.source, "there")
    assert len({constraint, Constraint.json_schema(schema)}) == 1


def test_the_request_whose_masks_take_long_is_the_one_that_ends(compiler, monkeypatch):
    """Time is scripted: the second of three matchers takes 60 ms of this thread whenever asked."""
    compiler = compiler()
    matchers = [compiler.matcher(Constraint("regex", f"{letter}*")) for letter in "abc"]
    filler = MaskFiller(300, torch.device("cpu"))

    def burn(self, pairs, words):
        if any(pair[0] is matchers[1].inner for pair in pairs):
            end = time.thread_time() + 0.06
            while time.thread_time() < end:
                pass
        compute(self, pairs, words)

    compute = mask.Masks._compute
    monkeypatch.setattr(mask.Masks, "_compute", burn)
    _, errors = filler.start(matchers).apply(torch.zeros(3, 300))
    assert not errors, "who is to blame is not known yet"
    masked, errors = filler.start(matchers).apply(torch.zeros(3, 300))
    assert errors.keys() == {1} and errors[1].status == 400
    assert masked[0].isfinite().any() and masked[2].isfinite().any()
