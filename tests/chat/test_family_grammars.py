"""Every family's grammar, compiled as the engine does. Oracle: transcripts written by hand, and the
parsers, which have their own tests.
"""

import json
import random

import pytest
from replies import TOOLS, ByteTokenizer, read, thinking_of
from transcripts import CALLS, FAMILIES, family, parsed, vocabulary_of

from oxillama_torch.chat.grammar import Thinking, Wish
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler


@pytest.fixture(scope="module")
def compiler():
    """Compilers by vocabulary: what the engine uses."""
    known = {}

    def of(vocabulary):
        key = tuple(vocabulary.markers)
        if key not in known:
            known[key] = ConstraintCompiler(ByteTokenizer(vocabulary))
        return known[key]

    return of


def follows(compiler, vocabulary, grammar, reply):
    """Whether a whole reply is in the grammar, and may end there."""
    matcher = compiler(vocabulary).matcher(Constraint("lark", grammar)).inner
    ids = vocabulary.ids(reply)
    return (
        matcher.validate_tokens(ids) == len(ids)
        and matcher.consume_tokens(ids)
        and (matcher.is_accepting())
    )


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("must_call", [True, False], ids=["required", "auto"])
@pytest.mark.parametrize("name", FAMILIES)
def test_grammar_accepts_the_models_own_calls(compiler, name, must_call, tokens):
    if name == "harmony" and not tokens:
        pytest.skip("its markers always are tokens")
    vocabulary = vocabulary_of(name, tokens=tokens)
    maker = family(name, vocabulary)
    grammar = maker.grammar(Wish(tools=TOOLS, must_call=must_call))
    reply = FAMILIES[name][2]
    assert follows(compiler, vocabulary, grammar, reply)
    assert not follows(compiler, vocabulary, grammar, reply.replace("get_weather", "get_wether"))
    assert not follows(compiler, vocabulary, grammar, reply.replace("city", "town"))
    plain = "Just text." if name != "harmony" else "<|channel|>final<|message|>Just text."
    assert follows(compiler, vocabulary, grammar, plain) is not must_call


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"llama", "harmony"}))
def test_one_call_where_calls_are_not_parallel(compiler, name):
    vocabulary = vocabulary_of(name)
    grammar = family(name, vocabulary).grammar(Wish(tools=TOOLS, must_call=True, many=False))
    assert not follows(compiler, vocabulary, grammar, FAMILIES[name][2])


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_is_drawn_from_the_grammar_is_a_call(compiler, name):
    """Random tokens under the mask: every reply is read as calls of known tools, with JSON."""
    vocabulary = vocabulary_of(name)
    maker = family(name, vocabulary)
    grammar = maker.grammar(Wish(tools=TOOLS, must_call=True, many=False))
    spellings = {i: s for s, i in vocabulary.markers.items()}
    for seed in range(6):
        reply = _draw(
            compiler(vocabulary).matcher(Constraint("lark", grammar)).inner, vocabulary, seed
        )
        text = b"".join(bytes([i]) if i < 256 else spellings[i].encode() for i in reply).decode()
        outcome = read(maker, text, vocabulary)
        assert len(outcome.calls) == 1, text
        [(called, arguments)] = outcome.calls
        value = json.loads(arguments)
        if called == "get_weather":
            assert isinstance(value["city"], str)
            assert isinstance(value.get("days", 0), int)
            assert value.get("unit", "C") in ("C", "F")


def _draw(matcher, vocabulary, seed):
    rng = random.Random(seed)
    reply = []
    for step in range(3000):
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(len(mask) * 8) if mask[i // 8] >> i % 8 & 1]
        if vocabulary.end_id in allowed:
            return reply
        # Towards an end: quotation marks, brackets and markers first, and few long texts.
        ends = [i for i in allowed if i in (34, 125, 60, 10) or i > 256]
        letters = [i for i in allowed if chr(i) in "abcdefghijkl0123"]
        pool = ends if ends and rng.random() < 0.5 + step / 500 else letters or ends or allowed
        ids = [rng.choice(pool)]
        tag = list(b"\n</parameter>")  # ends a text that could as well go on
        if step % 10 == 9 and matcher.validate_tokens(tag) == len(tag):
            ids = tag
        reply += ids
        assert matcher.consume_tokens(ids)
    raise AssertionError("no end")


@pytest.mark.parametrize("opened", [True, False])
def test_reasoning_comes_before_required_calls(compiler, opened):
    vocabulary = vocabulary_of("hermes", more=("<think>", "</think>"))
    maker = family("hermes", vocabulary)
    thinking = thinking_of(maker, "<think>", "</think>", opened=opened)
    grammar = maker.grammar(Wish(tools=TOOLS, must_call=True, thinking=thinking))
    thought = "Let me think <x>.\n</think>\n\n"
    reply = ("" if opened else "<think>") + thought + FAMILIES["hermes"][2]
    assert follows(compiler, vocabulary, grammar, reply)
    assert follows(compiler, vocabulary, grammar, FAMILIES["hermes"][2]) is not opened
    outcome = read(maker, reply, vocabulary, thinking=thinking, step=1)
    assert outcome.thought == "Let me think <x>."
    assert outcome.text == ""
    assert parsed(outcome.calls) == CALLS


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_spent_budget_ends_the_reasoning(compiler, budget):
    vocabulary = vocabulary_of("hermes", more=("<think>", "</think>"))
    maker = family("hermes", vocabulary)
    thinking = Thinking(maker.marker("<think>"), maker.marker("</think>"), True, budget)
    matcher = (
        compiler(vocabulary)
        .matcher(Constraint("lark", maker.grammar(Wish(thinking=thinking))))
        .inner
    )
    end = vocabulary.special_id("</think>")
    for _ in range(budget):
        assert matcher.consume_token(ord("x"))
    mask = matcher.compute_bitmask()
    assert [i for i in range(len(mask) * 8) if mask[i // 8] >> i % 8 & 1] == [end]
    assert matcher.consume_token(end)
    assert matcher.consume_tokens(list(b"The answer."))
    assert matcher.is_accepting()


def test_harmony_says_something_before_it_calls(compiler):
    vocabulary = vocabulary_of("harmony")
    grammar = family("harmony", vocabulary).grammar(Wish(tools=TOOLS))
    asides = (
        "<|channel|>analysis<|message|>Hm.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant"
    )
    assert follows(compiler, vocabulary, grammar, asides + FAMILIES["harmony"][2])
    assert follows(compiler, vocabulary, grammar, asides + "<|channel|>final<|message|>Yes.")
    assert not follows(compiler, vocabulary, grammar, asides)
