"""Guesses in the engine's step, with the scripted model, whose output shows any mistake in pages.

Oracle: ``scripted_model.continuation``, which knows the token list only.
"""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from hypothesis import given, settings
from proposers import Prophet, speculate
from scripted_model import CRASH_ID, NAN_ID, ScriptedModel, continuation

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent, FinishEvent, PromptEvent

VOCABULARY = 61
EOS = frozenset({0, 1})


def driver(proposer, *, most=4, model=None, eos=frozenset(), **config) -> Driver:
    config = EngineConfig(**{"page_size": 16, "kv_pages": 64, **config})
    engine = Engine(model or ScriptedModel(), config, eos_ids=eos)
    return Driver(speculate(engine, proposer, most=most))


@functools.cache
def future(prompt) -> list[int]:
    return continuation(list(prompt), 80, VOCABULARY, set())


def prompts_of(lengths) -> list[list[int]]:
    return [[5 + (7 * i + j * j) % 50 for j in range(n)] for i, n in enumerate(lengths)]


def check(events, prompt, max_tokens, eos=frozenset()):
    expected = continuation(list(prompt), max_tokens, VOCABULARY, set(eos))
    assert isinstance(events[0], PromptEvent) and tokens_of(events) == expected
    reason = "stop" if expected and expected[-1] in eos else "length"
    assert events[-1] == FinishEvent(reason, len(expected))


def test_right_guesses_save_steps():
    run = driver(Prophet(future), most=4)
    [events] = run.run(request_for([5, 6, 7], max_tokens=26))
    check(events, [5, 6, 7], 26)
    stats = run.engine.stats()
    # One token comes with the prompt, then five with each step.
    assert stats["steps"] == 1 + 5
    assert (stats["proposed_tokens"], stats["accepted_tokens"]) == (20, 20)
    assert (stats["speculated_items"], stats["generated_tokens"]) == (5, 26)


def test_wrong_guesses_are_made_less_and_less_often():
    run = driver(Prophet(future, right=lambda: 0), most=4)
    [events] = run.run(request_for([5, 6, 7], max_tokens=200))
    check(events, [5, 6, 7], 200)
    stats = run.engine.stats()
    assert stats["steps"] == 200 and stats["accepted_tokens"] == 0
    assert 4 < stats["proposed_tokens"] <= 12


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    max_tokens=st.integers(0, 40),
    kv_pages=st.integers(6, 20),
    batch_size=st.integers(1, 6),
    budget=st.sampled_from([1, 5, 17, 512]),
    prefix_cache=st.booleans(),
    most=st.sampled_from([1, 3, 8, 40]),
    right=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    eos=st.sampled_from([frozenset(), EOS]),
)
def test_guesses_of_any_quality_change_no_token(
    lengths, max_tokens, kv_pages, batch_size, budget, prefix_cache, most, right, eos
):
    """Right, wrong, half right, and beyond an end token, max_tokens or the pages there are."""
    turns = iter(right * 10_000)
    run = driver(
        Prophet(future, right=lambda: next(turns), wrong=(2, 33, NAN_ID, 60)),
        most=most,
        eos=eos,
        kv_pages=kv_pages,
        max_batch_size=batch_size,
        max_batch_tokens=budget,
        prefix_cache=prefix_cache,
    )
    prompts = prompts_of(lengths)
    requests = [request_for(p, max_tokens=max_tokens) for p in prompts]
    for events, prompt in zip(run.run(*requests), prompts):
        check(events, prompt, max_tokens, eos)
    assert run.engine.stats()["pages_used"] == 0


def test_the_context_ends_a_request_among_guesses():
    run = driver(Prophet(future), most=30, max_context=40)
    [events] = run.run(request_for(prompts_of([30])[0], max_tokens=None))
    assert events[-1] == FinishEvent("length", 10)
    assert tokens_of(events) == future(tuple(prompts_of([30])[0]))[:10]


def test_preemption_and_cancellation_among_guesses():
    run = driver(Prophet(future), most=8, kv_pages=5)
    prompts = prompts_of([20, 20, 12])
    for events, prompt in zip(run.run(*(request_for(p, max_tokens=40) for p in prompts)), prompts):
        check(events, prompt, 40)
    assert run.engine.stats()["preemptions"] > 0
    cancelled = run.add(request_for(prompts[0], max_tokens=40))
    run.step(3)
    run.cancel(cancelled)
    assert run.events[cancelled][-1] == FinishEvent("cancelled", 15)
    assert run.engine.stats()["pages_used"] == 0


def test_guesses_take_no_page_from_a_request():
    """Six pages, all needed by what is known: there is no room for guesses, and no preemption."""
    run = driver(Prophet(future, right=lambda: 0), most=40, kv_pages=4)
    prompts = prompts_of([18, 18])
    for events, prompt in zip(run.run(*(request_for(p, max_tokens=13) for p in prompts)), prompts):
        check(events, prompt, 13)
    assert run.engine.stats()["preemptions"] == 0


def test_only_known_tokens_reach_the_prefix_cache():
    turns = iter([3, 0, 1, 4] * 100)
    run = driver(Prophet(future, right=lambda: next(turns)), most=7)
    prompt = prompts_of([10])[0]
    [first] = run.run(request_for(prompt, max_tokens=60))
    longer = [*prompt, *tokens_of(first), 9, 9]
    [second] = run.run(request_for(longer, max_tokens=5))
    assert second[0].cached_tokens == 64, "all full pages but for the last token's"
    check(second, longer, 5)


def test_a_broken_guess_leaves_nothing_in_the_pages():
    """NaN behind a request's last token would reach it through a kernel that multiplies by 0."""
    run = driver(Prophet(future, right=lambda: 1, wrong=(NAN_ID,)), most=3, kv_pages=8)
    prompts = prompts_of([9, 20])
    for events, prompt in zip(run.run(*(request_for(p, max_tokens=30) for p in prompts)), prompts):
        check(events, prompt, 30)
    full = prompts_of([8 * 16 - 20])[0]
    check(run.run(request_for(full, max_tokens=10))[0], full, 10)


def test_a_guess_that_breaks_the_step_costs_itself_alone(caplog):
    run = driver(Prophet(future, right=lambda: 1, wrong=(CRASH_ID,)), most=3)
    prompts = prompts_of([9, 20])
    for events, prompt in zip(run.run(*(request_for(p, max_tokens=8) for p in prompts)), prompts):
        check(events, prompt, 8)
    assert run.engine.stats()["step_failures"] > 0 == run.engine.stats()["failed"]


def test_a_request_that_breaks_the_step_still_fails_alone(caplog):
    run = driver(Prophet(future), most=3)
    bad = [5, CRASH_ID, 7]
    healthy, broken = run.run(request_for([5, 6], max_tokens=9), request_for(bad, max_tokens=9))
    check(healthy, [5, 6], 9)
    assert isinstance(broken[-1], ErrorEvent)


def test_a_proposer_that_fails_costs_its_guesses_alone(caplog):
    class Broken:
        def propose(self, wishes):
            raise ValueError("scripted")

    run = driver(Broken())
    check(run.run(request_for([5, 6], max_tokens=9))[0], [5, 6], 9)
    assert run.engine.stats()["proposer_failures"] == 7, "tokens 2 to 8"


def test_a_device_beyond_use_ends_everything():
    class Broken:
        def propose(self, wishes):
            raise torch.AcceleratorError("scripted")

    run = driver(Broken())
    run.add(request_for([5, 6], max_tokens=9))
    with pytest.raises(torch.AcceleratorError):
        run.step(2)
