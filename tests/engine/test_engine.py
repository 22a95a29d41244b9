"""The engine's step with a scripted model, whose output shows any mistake in pages or positions.

Oracle: ``scripted_model.continuation``, which knows the token list only.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from hypothesis import given, settings
from sampling_oracle import log_softmax
from scripted_model import CRASH_ID, NAN_ID, ScriptedModel, context_logits, continuation

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent, FinishEvent, PromptEvent, RequestHandle
from oxillama_torch.errors import EngineError
from oxillama_torch.kernels.registry import use_kernels

VOCABULARY = 61
EOS = frozenset({0, 1})


def driver(model=None, *, eos=EOS, clock=None, **config) -> Driver:
    config = EngineConfig(**{"page_size": 16, "kv_pages": 64, **config})
    more = {} if clock is None else {"clock": clock}
    return Driver(Engine(model or ScriptedModel(), config, eos_ids=eos, **more))


def check_generation(events, prompt, max_tokens, eos=EOS):
    expected = continuation(prompt, max_tokens, VOCABULARY, set(eos))
    assert isinstance(events[0], PromptEvent) and events[0].prompt_tokens == len(prompt)
    assert tokens_of(events) == expected
    reason = "stop" if expected and expected[-1] in eos else "length"
    assert events[-1] == FinishEvent(reason, len(expected))
    assert len(events) == len(expected) + 2


def prompts_of(lengths, start=5) -> list[list[int]]:
    return [[start + (7 * i + j * j) % 50 for j in range(n)] for i, n in enumerate(lengths)]


def test_one_request():
    run = driver()
    [events] = run.run(request_for([5, 6, 7], max_tokens=20))
    check_generation(events, [5, 6, 7], 20)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    max_tokens=st.integers(0, 30),
    kv_pages=st.integers(6, 20),
    batch_size=st.integers(1, 8),
    budget=st.sampled_from([1, 5, 17, 512]),
    prefix_cache=st.booleans(),
)
def test_any_mix_gives_each_request_its_own_tokens(
    lengths, max_tokens, kv_pages, batch_size, budget, prefix_cache
):
    run = driver(
        kv_pages=kv_pages,
        max_batch_size=batch_size,
        max_batch_tokens=budget,
        prefix_cache=prefix_cache,
    )
    prompts = prompts_of(lengths)
    for events, prompt in zip(
        run.run(*(request_for(p, max_tokens=max_tokens) for p in prompts)), prompts
    ):
        check_generation(events, prompt, max_tokens)
    assert run.engine.stats()["pages_used"] == 0


def test_a_warm_prefix_cache_changes_nothing_but_the_work():
    run, prompt = driver(), prompts_of([50])[0]
    cold, warm = (run.run(request_for(prompt, max_tokens=10))[0] for _ in range(2))
    assert (cold[0].cached_tokens, warm[0].cached_tokens) == (0, 48)
    assert cold[1:] == warm[1:]
    assert run.engine.stats()["prefix_hit_tokens"] == 48


def test_generated_pages_are_found_by_the_next_turn():
    run, prompt = driver(eos=frozenset()), prompts_of([10])[0]
    [first] = run.run(request_for(prompt, max_tokens=30))
    longer = [*prompt, *tokens_of(first), 9, 9]
    [second] = run.run(request_for(longer, max_tokens=5))
    assert second[0].cached_tokens == 32, "the last token was never computed"
    check_generation(second, longer, 5, eos=())


def test_other_kernels_do_not_reuse_pages():
    run, prompt = driver(eos=frozenset()), prompts_of([50])[0]
    run.run(request_for(prompt, max_tokens=1))
    half_way = run.add(request_for(prompts_of([40], start=6)[0], max_tokens=30))
    run.step(3)
    with use_kernels("attention=reference"):
        [switched] = run.run(request_for(prompt, max_tokens=1))
        assert switched[0].cached_tokens == 0
        [again] = run.run(request_for(prompt, max_tokens=1))
        assert again[0].cached_tokens == 48
        mixed = [*prompts_of([40], start=6)[0], *tokens_of(run.events[half_way])]
        assert run.run(request_for(mixed, max_tokens=1))[0][0].cached_tokens == 0
    assert run.run(request_for(prompt, max_tokens=1))[0][0].cached_tokens == 0


def test_preemption_keeps_tokens_and_sends_none_twice():
    run = driver(kv_pages=5, eos=frozenset())
    prompts = prompts_of([20, 20, 12])
    results = run.run(*(request_for(p, max_tokens=40) for p in prompts))
    assert run.engine.stats()["preemptions"] > 0
    for events, prompt in zip(results, prompts):
        check_generation(events, prompt, 40, eos=())


@pytest.mark.parametrize("budget", [3, 512])
def test_end_tokens_stop_ids_limits(budget):
    run = driver(max_batch_tokens=budget, eos=frozenset())
    prompt = [5, 6, 7]
    free = continuation(prompt, 30, VOCABULARY, set())
    at = next(i for i in range(5, 30) if free[i] not in free[:i])
    [events] = run.run(request_for(prompt, max_tokens=30, stop_token_ids=(free[at],)))
    assert tokens_of(events) == free[: at + 1] and events[-1] == FinishEvent("stop", at + 1)
    [events] = run.run(request_for(prompt, max_tokens=1))
    assert tokens_of(events) == free[:1] and events[-1] == FinishEvent("length", 1)
    [events] = run.run(request_for(prompt, max_tokens=0))
    assert [type(event) for event in events] == [PromptEvent, FinishEvent]


def test_ignore_eos_and_min_tokens():
    prompt = [5, 6, 7]
    free = continuation(prompt, 30, VOCABULARY, set())
    run = driver(eos=frozenset({free[3]}))
    [events] = run.run(request_for(prompt, max_tokens=30, ignore_eos=True))
    assert tokens_of(events) == free
    [events] = run.run(request_for(prompt, max_tokens=30, min_tokens=10))
    tokens = tokens_of(events)
    assert len(tokens) >= 10 and free[3] not in tokens[:9] and tokens[:3] == free[:3]


def test_the_context_ends_a_request():
    run = driver(max_context=40, eos=frozenset())
    [events] = run.run(request_for(prompts_of([30])[0], max_tokens=None))
    assert events[-1] == FinishEvent("length", 10)


def test_logprobs_and_prompt_logprobs_against_the_script():
    run = driver(max_batch_tokens=7, eos=frozenset())
    prompt = prompts_of([23])[0]
    [events] = run.run(request_for(prompt, max_tokens=4, logprobs=2, prompt_logprobs=3))
    tokens = prompt + tokens_of(events)
    found = [*events[0].logprobs, *(event.logprobs for event in events[1:-1])]
    assert found[0] is None and len(found) == len(tokens)
    for position in range(1, len(tokens)):
        logits = context_logits(tokens[:position], VOCABULARY).numpy()
        entry, expected = found[position], log_softmax(logits)
        assert entry.token_id == tokens[position]
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-6)
        order = sorted(range(VOCABULARY), key=lambda i: (-logits[i], i))
        assert [i for i, _ in entry.top] == order[: 3 if position < len(prompt) else 2]


def test_prompt_logprobs_do_not_depend_on_cache_or_preemption():
    prompts = prompts_of([37, 37, 20])
    prompts[1] = prompts[0]

    def scored(run):
        out = run.run(*(request_for(p, max_tokens=30, prompt_logprobs=1) for p in prompts))
        return [[event.logprobs for event in events[:1]] + tokens_of(events) for events in out]

    expected = scored(driver(eos=frozenset()))
    scarce = driver(eos=frozenset(), kv_pages=6, max_batch_tokens=9)
    assert scored(scarce) == expected and scarce.engine.stats()["preemptions"]
    assert scored(scarce) == expected, "with a warm cache"


@pytest.mark.parametrize("budget", [4, 512])
def test_capture_brings_every_row_of_the_prompt(budget):
    run, prompt = driver(max_batch_tokens=budget), prompts_of([18])[0]
    run.run(request_for(prompt, max_tokens=0))
    [logits, hidden] = run.run(
        request_for(prompt, max_tokens=0, capture="logits", prompt_logprobs=0),
        request_for(prompt, max_tokens=0, capture="hidden"),
    )
    expected = [context_logits(prompt[: i + 1], VOCABULARY).numpy() for i in range(18)]
    assert np.array_equal(logits[0].captured, np.stack(expected))
    assert len(logits[0].logprobs) == 18 and hidden[0].captured.shape == (18, 1)


def test_cancel_while_queued_in_prefill_and_in_decode():
    run = driver(max_batch_size=2, max_batch_tokens=8, eos=frozenset())
    decode = run.add(request_for([5, 6], max_tokens=50))
    prefill = run.add(request_for(prompts_of([40])[0], max_tokens=5))
    queued = run.add(request_for([8, 9], max_tokens=5))
    run.step(2)
    for request_id, generated in ((queued, 0), (prefill, 0), (decode, 2)):
        run.cancel(request_id)
        assert run.events[request_id][-1] == FinishEvent("cancelled", generated)
    stats = run.engine.stats()
    assert stats["pages_used"] == stats["running"] == stats["waiting"] == 0
    assert not run.engine.has_work and stats["cancelled"] == 3
    run.cancel(decode)  # a second time: nothing happens


def test_deadlines_end_requests_wherever_they_stand():
    now = [100.0]
    run = driver(max_batch_size=1, eos=frozenset(), clock=lambda: now[0])
    running = run.add(request_for([5], max_tokens=500, deadline=105.0))
    queued = run.add(request_for([6], max_tokens=500, deadline=103.0))
    free = run.add(request_for([7], max_tokens=3))
    run.step(3)
    now[0] = 104.0
    run.step()
    assert run.events[queued] == [FinishEvent("deadline", 0)]
    now[0] = 106.0
    run.step()
    assert run.events[running][-1] == FinishEvent("deadline", 4)
    run.run()
    assert run.events[free][-1] == FinishEvent("length", 3)


def test_a_deadline_is_that_of_its_request_alone():
    """Not of another one that came by the same id afterwards."""
    now = [100.0]
    engine = driver(clock=lambda: now[0]).engine
    reasons = []
    for at, deadline, tokens in ((100.0, 101.0, 1), (102.0, 200.0, 5)):
        now[0] = at
        request = replace(request_for([5], max_tokens=tokens, deadline=deadline), request_id="it")
        engine.add(RequestHandle(request, lambda _: None))
        while engine.has_work:
            reasons += [e for _, e in engine.step() if isinstance(e, FinishEvent)]
    assert reasons == [FinishEvent("length", 1), FinishEvent("length", 5)]


def test_a_request_that_breaks_the_step_fails_alone(caplog):
    run = driver(eos=frozenset())
    prompts = prompts_of([9, 20, 5, 33])
    prompts[2][1] = CRASH_ID
    results = run.run(*(request_for(p, max_tokens=12) for p in prompts))
    for index in (0, 1, 3):
        check_generation(results[index], prompts[index], 12, eos=())
    assert isinstance(results[2][-1], ErrorEvent) and len(results[2]) == 1
    assert isinstance(results[2][0].error, EngineError)
    assert isinstance(results[2][0].error.__cause__, RuntimeError)
    stats = run.engine.stats()
    assert (stats["failed"], stats["step_failures"], stats["pages_used"]) == (1, 1, 0)


def test_a_failure_of_the_batch_alone_costs_nobody_anything(caplog):
    """Out of memory with the batch as a whole: each request is small enough by itself."""

    def refuse_many(batch):
        if len(batch.seq_lens) > 1:
            raise torch.OutOfMemoryError("scripted")

    run = driver(ScriptedModel(on_forward=refuse_many), eos=frozenset())
    prompts = prompts_of([9, 20, 5])
    for events, prompt in zip(run.run(*(request_for(p, max_tokens=6) for p in prompts)), prompts):
        check_generation(events, prompt, 6, eos=())


def test_a_device_beyond_use_is_not_tried_again(caplog):
    def broken(batch):
        raise torch.AcceleratorError("scripted")

    run = driver(ScriptedModel(on_forward=broken))
    run.add(request_for([5], max_tokens=6))
    with pytest.raises(torch.AcceleratorError):
        run.step()


def test_nan_fails_its_own_request_and_stays_in_its_pages():
    run = driver(kv_pages=8, eos=frozenset())
    prompts = prompts_of([9, 20, 5])
    prompts[1][3] = NAN_ID
    results = run.run(*(request_for(p, max_tokens=12) for p in prompts))
    check_generation(results[0], prompts[0], 12, eos=())
    check_generation(results[2], prompts[2], 12, eos=())
    assert "not finite" in str(results[1][-1].error)
    # Every page is used again; the scripted model multiplies by zero what lies behind the end.
    full = prompts_of([8 * 16 - 20])[0]
    check_generation(run.run(request_for(full, max_tokens=10))[0], full, 10, eos=())
    [scored] = run.run(request_for(prompts[1], max_tokens=0, prompt_logprobs=0))
    assert isinstance(scored[-1], ErrorEvent)


def test_draws_depend_on_seed_and_position_only():
    sampled = {"temperature": 1.0, "max_tokens": 40}
    prompts = prompts_of([9, 30, 5, 17])
    alone = [
        tokens_of(driver(eos=frozenset()).run(request_for(p, seed=i, **sampled))[0])
        for i, p in enumerate(prompts)
    ]
    scarce = driver(eos=frozenset(), kv_pages=5, max_batch_tokens=6)
    requests = [request_for(p, seed=i, **sampled) for i, p in enumerate(prompts)]
    together = [tokens_of(events) for events in scarce.run(*reversed(requests))][::-1]
    assert together == alone and scarce.engine.stats()["preemptions"]
    assert len({tuple(tokens) for tokens in alone}) == 4


def test_stats_name_what_is_going_on():
    run = driver(max_batch_size=1, eos=frozenset(), max_batch_tokens=8)
    run.add(request_for(prompts_of([20])[0], max_tokens=4))
    run.add(request_for([5], max_tokens=4))
    run.step(4)
    stats = run.engine.stats()
    assert (stats["running"], stats["waiting"], stats["steps"]) == (1, 1, 4)
    assert (stats["prompt_tokens"], stats["generated_tokens"]) == (20, 2)
    assert (stats["pages"], stats["pages_used"]) == (64, 2)
    assert stats["step_seconds"] >= stats["last_step_seconds"] > 0
    assert all(isinstance(value, (int, float)) for value in stats.values())
