"""Constraints in the engine: what comes out obeys them, whatever else goes on, and bit for bit.

Oracles: jsonschema and Python's ``re`` for what came out; the request alone, sampling every token,
for what it should be (compared with ``==``, log-probabilities too).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import jsonschema
import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent, FinishEvent
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.loader import load_model
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler
from oxillama_torch.tokenizer.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "prefix": {"enum": ["attention", "tokenizer", "positions"]},
        "index": {"type": "integer", "minimum": 3, "maximum": 4711},
        "values": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["prefix", "index", "values"],
    "additionalProperties": False,
}
CONSTRAINTS = (
    Constraint.json_schema(SCHEMA),
    None,
    Constraint("regex", r"(ab|c)+[0-9]{2,5}\."),
    Constraint.choice(["the logits of the last position", "the logits of all", "none"]),
    Constraint("gbnf", 'root ::= word ("," word)* "s"\nword ::= [a-z]{2,6}'),
    None,
    Constraint("lark", 'start: "<think>" /[a-z ]{1,12}/ "</think>" %json {"type": "integer"}'),
)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model, tokenizer and compiler over one tiny file."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny("llama", path, type_name="Q8_0")
    with read_gguf(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
        model = load_model(gguf)
    compiler = ConstraintCompiler(tokenizer)
    yield model, tokenizer, compiler
    compiler.close()


@pytest.fixture
def driver(parts):
    model, tokenizer, compiler = parts

    def make(**config) -> Driver:
        config = EngineConfig(**{"page_size": 16, "kv_pages": 256, **config})
        engine = Engine(model, config, eos_ids=tokenizer.eos_ids, constraints=compiler)
        return Driver(engine)

    return make


@pytest.fixture
def text(parts):
    tokenizer = parts[1]
    return lambda events: tokenizer.decode(tokens_of(events), skip_special=True)


def requests(logprobs=None):
    """11 requests, most of them constrained, with prompts, samplers and seeds of their own."""
    generator = torch.Generator().manual_seed(5)
    for index in range(11):
        prompt = torch.randint(5, 380, (1 + 7 * index % 40,), generator=generator).tolist()
        yield request_for(
            prompt,
            max_tokens=40,
            seed=index,
            temperature=0 if index % 3 == 0 else 1.3,
            top_p=0.95 if index % 2 else 1.0,
            repetition_penalty=1.1 if index % 4 == 0 else 1.0,
            logprobs=logprobs,
            constraint=CONSTRAINTS[index % len(CONSTRAINTS)],
        )


def outcome(events) -> tuple:
    return tokens_of(events), events[-1]


@pytest.fixture(scope="module")
def alone(parts):
    """Each request by itself in a fresh engine, every token sampled: logprobs are asked for."""
    model, tokenizer, compiler = parts
    config = EngineConfig(page_size=16, kv_pages=256, prefix_cache=False)
    engine = Engine(model, config, eos_ids=tokenizer.eos_ids, constraints=compiler)
    return [Driver(engine).run(request)[0] for request in requests(logprobs=2)]


def test_outputs_obey(alone, text):
    finished = 0
    for request, events in zip(requests(), alone):
        constraint = request.params.constraint
        if constraint is None or events[-1].reason == "length":
            continue
        finished += 1
        made = text(events)
        match constraint.kind:
            case "json_schema":
                jsonschema.validate(json.loads(made), SCHEMA)
            case "regex":
                assert re.fullmatch(constraint.source, made)
            case "choice":
                assert made in json.loads(constraint.source)
            case "gbnf":
                assert re.fullmatch(r"[a-z]{2,6}(,[a-z]{2,6})*s", made)
            case "lark":
                assert re.fullmatch(r"<think>[a-z ]{1,12}</think>-?(0|[1-9][0-9]*)", made)
    assert finished >= 6, "too few came to an end for this to mean anything"


def test_in_a_mixed_batch_same_bits(driver, alone):
    run = driver()
    mixed = run.run(*requests(logprobs=2))
    assert [events[1:] for events in mixed] == [events[1:] for events in alone]


@pytest.mark.parametrize(
    "config",
    [{}, {"max_batch_tokens": 7}, {"kv_pages": 6, "max_batch_size": 5}, {"prefix_cache": False}],
    ids=["whole", "chunks", "preempted", "no-prefix-cache"],
)
def test_forced_tokens_are_those_that_sampling_takes(driver, alone, config):
    run = driver(**config)
    skipping = run.run(*requests())
    assert list(map(outcome, skipping)) == list(map(outcome, alone))
    if "kv_pages" in config:
        assert run.engine.stats()["preemptions"] > 0


def test_forced_tokens_save_steps(driver):
    constraint = Constraint("regex", "the logits of the last position decide which token follows")
    run = driver()
    [events] = run.run(request_for([7, 8], max_tokens=80, constraint=constraint))
    assert events[-1].reason == "stop"
    assert run.engine.stats()["steps"] < len(tokens_of(events)) / 2


def test_a_prefix_hit_changes_nothing(driver, alone):
    run = driver()
    first, second = (list(map(outcome, run.run(*requests()))) for _ in range(2))
    assert first == second == list(map(outcome, alone))
    assert run.engine.stats()["prefix_hit_tokens"] > 0


def test_max_tokens_cuts_forced_tokens_off(driver):
    constraint = Constraint("regex", "the logits of the last position decide")
    for limit in (1, 2, 5):
        [events] = driver().run(request_for([7], max_tokens=limit, constraint=constraint))
        assert len(tokens_of(events)) == limit
        assert events[-1] == FinishEvent("length", limit)


def test_end_token_only_where_the_grammar_accepts(driver, parts):
    end = min(parts[1].eos_ids)
    wish = {end: 100.0}  # the model wants nothing but to stop
    [events] = driver().run(
        request_for([7], logit_bias=wish, constraint=Constraint("regex", "(ab){3,9}"))
    )
    assert tokens_of(events)[-1] == end and events[-1].reason == "stop"
    made = parts[1].decode(tokens_of(events)[:-1])
    assert made == "ababab"


def test_ignore_eos_goes_on_while_the_grammar_can(driver, text):
    params = {"logit_bias": {}, "ignore_eos": True, "max_tokens": 9}
    open_end = Constraint("regex", "[ab]*")
    [events] = driver().run(request_for([7], constraint=open_end, **params))
    assert len(tokens_of(events)) == 9 and events[-1].reason == "length"
    closed = Constraint("regex", "[ab]{4}")
    [events] = driver().run(request_for([7], constraint=closed, **params))
    assert events[-1].reason == "stop" and len(text(events)) == 4


def test_min_tokens_bans_the_end_as_long_as_there_is_another_way(driver, text):
    constraint = Constraint("regex", "a{1,9}")
    [events] = driver().run(request_for([7], constraint=constraint, min_tokens=4))
    assert len(tokens_of(events)) >= 4 and re.fullmatch("a{1,9}", text(events))


def test_stop_token_in_a_forced_run_ends_it(driver, parts):
    stop = parts[1].encode("c", add_special=False)[0]
    constraint = Constraint("regex", "abcabc")
    [events] = driver().run(request_for([7], constraint=constraint, stop_token_ids=(stop,)))
    assert tokens_of(events)[-1] == stop and tokens_of(events).count(stop) == 1


def test_masked_logprobs_sum_to_one(driver):
    choice = Constraint.choice(["a", "b", "c"])
    raw, masked = (
        driver().run(
            request_for([7], constraint=choice, logprobs=8, logprobs_mode=mode, max_tokens=1)
        )[0][1]
        for mode in ("raw", "masked")
    )
    assert raw.token_id == masked.token_id and raw.logprobs.logprob < masked.logprobs.logprob
    assert len(raw.logprobs.top) == 8 and len(masked.logprobs.top) == 3
    total = torch.tensor([value for _, value in masked.logprobs.top]).exp().sum()
    assert total == pytest.approx(1)
    offsets = [masked.logprobs.logprob - raw.logprobs.logprob]
    offsets += [
        value - dict(raw.logprobs.top)[i]
        for i, value in masked.logprobs.top
        if i in dict(raw.logprobs.top)
    ]
    assert offsets == pytest.approx([offsets[0]] * len(offsets))


def test_a_grammar_that_gets_too_costly_ends_its_own_request(driver, text, monkeypatch):
    run = driver()
    bystander = request_for([9, 10], max_tokens=12, constraint=CONSTRAINTS[2])
    [expected] = driver().run(replace(bystander, request_id="expected"))
    victim = run.add(request_for([7], constraint=Constraint("regex", "(ab)*")))
    matcher = run.engine._handles[victim][0].matcher
    # A token the grammar does not have: llguidance's own way into its state of error.
    matcher.inner.consume_token(0)
    other = run.add(bystander)
    while run.engine.has_work:
        run.step()
    error = run.events[victim][-1]
    assert isinstance(error, ErrorEvent) and isinstance(error.error, RequestError)
    assert error.error.status == 400 and error.error.param == "constraint"
    assert outcome(run.events[other]) == outcome(expected)


def test_without_a_vocabulary_constraints_are_refused(parts):
    engine = Engine(parts[0], EngineConfig(kv_pages=8))
    with pytest.raises(UnsupportedError, match="no vocabulary"):
        engine.matcher(request_for([7], constraint=CONSTRAINTS[2]))
