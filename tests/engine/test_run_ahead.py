"""Decoding on lines and one step ahead: the tokens of the plain path, whatever happens meanwhile.

Oracles: ``scripted_model.continuation``, which knows the token list only, and the same requests in
an engine that launches every step kernel by kernel. Graphs are recorded by ``RecordedCalls``.
"""

from __future__ import annotations

import logging

import hypothesis.strategies as st
import pytest
from engine_driver import Driver, request_for, tokens_of
from hypothesis import given, settings
from recorded_calls import RecordedCalls
from scripted_model import NAN_ID, ScriptedModel, continuation

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent, FinishEvent
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.kernels.registry import observed, use_kernels

VOCABULARY = 61
EOS = frozenset({0, 1})


def driver(device=None, *, plain=False, eos=frozenset(), banned=frozenset(), **config) -> Driver:
    config = EngineConfig(
        **{"page_size": 16, "kv_pages": 64, "max_batch_size": 8, "graph_prompt_tokens": 0, **config}
    )
    device = None if plain else device or RecordedCalls()
    engine = Engine(ScriptedModel(), config, eos_ids=eos, banned_ids=banned, graphs=device)
    return Driver(engine)


def prompts_of(lengths) -> list[list[int]]:
    return [[5 + (7 * i + j * j) % 50 for j in range(n)] for i, n in enumerate(lengths)]


def test_one_greedy_request():
    run, prompt = driver(), [5, 6, 7]
    [events] = run.run(request_for(prompt, max_tokens=40))
    assert tokens_of(events) == continuation(prompt, 40, VOCABULARY, set())
    stats = run.engine.stats()
    assert stats["graph_steps"] == 39 and stats["steps_ahead"] == 38 and stats["graphs"] == 1
    assert stats["steps"] == 40 and stats["pages_used"] == 0


@settings(max_examples=12, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 30)),
        min_size=1,
        max_size=9,
    ),
    cancelled=st.dictionaries(st.integers(0, 8), st.integers(1, 25), max_size=3),
    kv_pages=st.integers(6, 20),
    batch_size=st.integers(1, 9),
    budget=st.sampled_from([9, 40, 512]),
)
def test_any_schedule_of_arrivals(arrivals, cancelled, kv_pages, batch_size, budget):
    """Joins, leaves, new pages, preemption, cancellation, end tokens, lengths."""
    run = driver(eos=EOS, kv_pages=kv_pages, max_batch_size=batch_size, max_batch_tokens=budget)
    prompts = prompts_of([length for _, length, _ in arrivals])
    waiting = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
    ids: dict[int, str] = {}
    for step in range(2000):
        while waiting and arrivals[waiting[0]][0] <= step:
            number = waiting.pop(0)
            request = request_for(prompts[number], max_tokens=arrivals[number][2])
            ids[number] = run.add(request)
        for number, at in cancelled.items():
            if at == step and number in ids:
                run.cancel(ids[number])
        if not waiting and not run.engine.has_work:
            break
        run.step()
    for number, (_, _, max_tokens) in enumerate(arrivals):
        events = run.events[ids[number]]
        expected = continuation(prompts[number], max_tokens, VOCABULARY, set(EOS))
        found = tokens_of(events)
        if events[-1].reason == "cancelled":
            assert number in cancelled and found == expected[: len(found)]
        else:
            reason = "stop" if expected[-1] in EOS else "length"
            assert found == expected and events[-1] == FinishEvent(reason, len(expected))
    assert run.engine.stats()["pages_used"] == 0


KINDS = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 5, "logprobs": 0},
    {"top_p": 0.8, "min_p": 0.05, "logprobs": 3},
    {"temperature": 1.5, "repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.5, "logprobs": 1},
    {"repetition_penalty": 1.5, "repeat_last_n": 4},
    {"logit_bias": {9: 3.0, 12: -2.0}},
    {"min_tokens": 6, "stop_token_ids": (9, 17, 23, 31)},
    {"typical_p": 0.6},
    {"temperature": 0, "repetition_penalty": 2.0, "logprobs": 2, "logprobs_mode": "masked"},
    {"stop_token_ids": tuple(range(40, 60))},
]


def kinds(max_tokens=25):
    return [
        request_for(
            [5 + number, 6, 7, 6] * (1 + number % 3),
            **{"temperature": 1.0, "seed": number - 3, "max_tokens": max_tokens, **kind},
        )
        for number, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_kind_of_sampling(batch_size):
    """What the op does not serve sends its steps to the chain, and lines find back afterwards."""
    options = {"banned": frozenset({20, 21}), "max_batch_size": batch_size, "kv_pages": 40}
    expected = driver(plain=True, **options).run(*kinds())
    run = driver(**options)
    assert run.run(*kinds()) == expected
    stats = run.engine.stats()
    assert stats["graph_steps"] > 0 and stats["sampled_by_chain"] > 0


def test_served_kinds_together_stay_on_lines():
    served = [kind for i, kind in enumerate(kinds(60)) if i not in (5, 6, 7, 8)]
    expected = driver(plain=True).run(*served)
    run = driver()
    assert run.run(*served) == expected
    stats = run.engine.stats()
    assert stats["steps_ahead"] > 50 and stats["sampled_by_chain"] < 25, "those of prompts"


def test_more_requests_than_lines_take_the_plain_path():
    prompts = prompts_of([4, 9, 17, 5, 6])
    run = driver(graph_batch_size=3)
    results = run.run(*(request_for(p, max_tokens=4 + 6 * i) for i, p in enumerate(prompts)))
    for i, (events, prompt) in enumerate(zip(results, prompts)):
        assert tokens_of(events) == continuation(prompt, 4 + 6 * i, VOCABULARY, set())
    assert run.engine.stats()["graph_steps"] == 18, "once two have left"


def test_lines_are_given_up_as_requests_leave():
    prompts = prompts_of([3] * 8)
    run = driver()
    results = run.run(*(request_for(p, max_tokens=3 + 5 * i) for i, p in enumerate(prompts)))
    for i, (events, prompt) in enumerate(zip(results, prompts)):
        assert tokens_of(events) == continuation(prompt, 3 + 5 * i, VOCABULARY, set())
    assert run.engine.stats()["graphs"] == 4, "of 8, 4, 2 and 1 lines"


def test_a_request_that_turns_nan_fails_alone():
    prompts = prompts_of([9, 9, 9])
    prompts[1][4] = NAN_ID
    run = driver()
    results = run.run(*(request_for(p, max_tokens=30) for p in prompts))
    assert isinstance(results[1][-1], ErrorEvent)
    for index in (0, 2):
        assert tokens_of(results[index]) == continuation(prompts[index], 30, VOCABULARY, set())


@pytest.mark.parametrize("at", [3, 4])
def test_a_launch_that_fails_costs_nobody_a_token(at, caplog):
    """The first launch of a run of steps, and one that is a step ahead."""
    device = RecordedCalls()
    run, prompts = driver(device), prompts_of([4, 9])
    ids = [run.add(request_for(p, max_tokens=30)) for p in prompts]
    run.step(at)
    device.fail_next = True
    with caplog.at_level(logging.CRITICAL):
        run.run()
    for request_id, prompt in zip(ids, prompts):
        assert tokens_of(run.events[request_id]) == continuation(prompt, 30, VOCABULARY, set())
    assert run.engine.stats()["step_failures"] == 1


def test_a_launch_that_fails_leaves_nobody_behind_on_its_lines(caplog):
    """One would go on writing into pages that are others' by now."""
    device = RecordedCalls()
    run = driver(device, kv_pages=6, prefix_cache=False)
    ids = [run.add(request_for(p, max_tokens=9)) for p in prompts_of([9] * 4)]
    run.step()
    device.fail_next = True
    with caplog.at_level(logging.CRITICAL):
        run.step()
    for request_id in ids:
        run.cancel(request_id)
    prompts = prompts_of([12, 13, 14])
    results = run.run(*(request_for(p, max_tokens=12) for p in prompts))
    for events, prompt in zip(results, prompts):
        assert tokens_of(events) == continuation(prompt, 12, VOCABULARY, set())


def test_other_weights_and_other_kernels_make_new_graphs():
    device = RecordedCalls()
    run, prompt = driver(device), [5, 6, 7]
    request_id = run.add(request_for(prompt, max_tokens=40))
    run.step(5)
    device.invalidate()
    run.engine.forget_prefixes()
    run.step(5)
    assert device.captures == 2
    device.invalidate()
    with use_kernels("sample=reference"):
        run.step(5)
    device.invalidate()
    run.run()
    assert device.captures == 4
    assert tokens_of(run.events[request_id]) == continuation(prompt, 40, VOCABULARY, set())


def test_nothing_is_hidden_from_who_looks_at_kernels():
    run, prompt = driver(), [5, 6, 7]
    request_id = run.add(request_for(prompt, max_tokens=20))
    run.step(5)
    before = run.engine.stats()["graph_steps"]
    with observed(lambda kernel, call: kernel):
        run.step(5)
    assert run.engine.stats()["graph_steps"] == before, "one was in flight already"
    run.run()
    assert tokens_of(run.events[request_id]) == continuation(prompt, 20, VOCABULARY, set())


def test_graphs_are_captured_beforehand_with_their_progress():
    device, seen = RecordedCalls(), []
    run = driver(device, max_batch_size=17, max_context=4096)
    run.engine.capture_graphs(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)], "of 17, 16, 8, 4, 2 and 1 lines"
    prompts = prompts_of([4, 9, 17])
    results = run.run(*(request_for(p, max_tokens=30) for p in prompts))
    for events, prompt in zip(results, prompts):
        assert tokens_of(events) == continuation(prompt, 30, VOCABULARY, set())
    assert device.captures == 6


def test_every_copy_is_read_once_but_for_those_nobody_waits_for():
    device = RecordedCalls()
    run = driver(device)
    request_id = run.add(request_for([5, 6, 7], max_tokens=40))
    run.step(6)
    run.cancel(request_id)
    assert not run.engine.has_work and device.fetched == device.read + 1
    [events] = run.run(request_for([5, 6, 7], max_tokens=5))
    assert tokens_of(events) == continuation([5, 6, 7], 5, VOCABULARY, set())
    assert device.fetched == device.read


def test_in_the_batching_thread_with_a_call_between_steps():
    engine = driver().engine
    thread, prompts = EngineThread(engine), prompts_of([4, 9, 17])
    thread.start()
    try:
        handles = [thread.submit(request_for(p, max_tokens=60)) for p in prompts]
        thread.call(lambda engine: engine.forget_prefixes())
        results = [list(handle.events()) for handle in handles]
    finally:
        thread.stop()
    for events, prompt in zip(results, prompts):
        assert tokens_of(events) == continuation(prompt, 60, VOCABULARY, set())
    assert engine.stats()["steps_ahead"] > 0
