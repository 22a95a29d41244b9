"""Preempted requests whose pages wait in host memory.

Oracles: ``scripted_model.continuation``, which knows the token list only; the request alone in an
engine with room for everything; the same load with pages computed again.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from hypothesis import given, settings
from recorded_calls import RecordedCalls
from scripted_model import NAN_ID, ScriptedModel, continuation
from tiny_adapters import save_adapter
from tiny_models import write_tiny

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent, FinishEvent, GenerationRequest

VOCABULARY = 61
PAGE_BYTES = 16 * 2 * 4  # of the scripted model


def driver(*, graphs=False, **config) -> Driver:
    base = {"page_size": 16, "kv_pages": 8, "preemption": "swap", "graph_prompt_tokens": 0}
    device = RecordedCalls() if graphs else None
    return Driver(Engine(ScriptedModel(), EngineConfig(**{**base, **config}), graphs=device))


def prompt_of(length, start=5) -> list[int]:
    return [start + (7 * length + j * j) % 50 for j in range(length)]


def check(events, prompt, max_tokens):
    expected = continuation(prompt, max_tokens, VOCABULARY, set())
    assert tokens_of(events) == expected
    assert events[-1] == FinishEvent("length", len(expected))


def nothing_is_held(engine) -> bool:
    stats = engine.stats()
    return stats["pages_used"] == stats["swap_pages_used"] == 0


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 50),  # prompt tokens
        st.integers(0, 30),  # max_tokens
        st.integers(0, 2),  # priority
        st.integers(0, 1),  # which of two shared prefixes
        st.integers(0, 8),  # steps before the next request arrives
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=30, deadline=None)
@given(
    kv_pages=st.integers(6, 12),
    host_pages=st.sampled_from([1, 3, 8, 40]),
    budget=st.sampled_from([4, 17, 512]),
    prefix_cache=st.booleans(),
    graphs=st.booleans(),
    requests=REQUESTS,
    cancel_every=st.integers(2, 9),
    forget_every=st.integers(3, 30),
)
def test_any_schedule_gives_each_request_its_own_tokens(
    kv_pages, host_pages, budget, prefix_cache, graphs, requests, cancel_every, forget_every
):
    run = driver(
        graphs=graphs,
        kv_pages=kv_pages,
        swap_memory_bytes=host_pages * PAGE_BYTES,
        max_batch_tokens=budget,
        prefix_cache=prefix_cache,
    )
    wanted = []
    for number, (length, max_tokens, priority, prefix, pause) in enumerate(requests):
        prompt = prompt_of(length, start=5 + prefix)
        request = request_for(prompt, max_tokens=max_tokens, priority=priority)
        wanted.append((run.add(request), prompt, max_tokens))
        for _ in range(pause):
            run.step()
            if run.engine.stats()["steps"] % forget_every == 0:
                run.engine.forget_prefixes()
        if number % cancel_every == 1:
            run.cancel(wanted.pop()[0])
    run.run()
    for request_id, prompt, max_tokens in wanted:
        check(run.events[request_id], prompt, max_tokens)
    stats = run.engine.stats()
    assert nothing_is_held(run.engine)
    assert stats["swapped_in"] <= stats["swapped_out"] <= stats["preemptions"]
    assert stats["preemptions"] - stats["swapped_out"] >= stats["swap_refused"]


def scarce_load(**config):
    """Two requests that cannot both stay: (their events, the engine's figures)."""
    run = driver(kv_pages=5, prefix_cache=False, **config)
    results = run.run(*(request_for(prompt_of(20), max_tokens=45) for _ in range(2)))
    for events in results:
        check(events, prompt_of(20), 45)
    return run.engine.stats()


def test_nothing_is_computed_again():
    again = scarce_load(preemption="recompute")
    swapped = scarce_load()
    assert again["preemptions"] > 0 and "swapped_out" not in again
    assert swapped["preemptions"] == swapped["swapped_out"] == swapped["swapped_in"] > 0
    assert swapped["prompt_tokens"] == 40 < again["prompt_tokens"]


def test_where_host_memory_is_full_tokens_are_computed_again_and_counted():
    stats = scarce_load(swap_memory_bytes=PAGE_BYTES)
    assert stats["swap_refused"] == stats["preemptions"] > 0 == stats["swapped_out"]


def preempted_once(**config) -> tuple[Driver, str, list[int]]:
    """A driver with one request that has just lost its pages, in the midst of decoding."""
    run, prompt = driver(**config), prompt_of(40)
    request_id = run.add(request_for(prompt, max_tokens=20))
    run.step(4)
    scheduler = run.engine._scheduler
    scheduler._preempt(scheduler.running[0])
    return run, request_id, prompt


def test_a_cancelled_request_leaves_nothing_in_host_memory():
    run, request_id, _ = preempted_once()
    assert run.engine.stats()["swap_pages_used"] == 3
    run.cancel(request_id)
    assert nothing_is_held(run.engine)


def test_cached_pages_are_taken_and_only_the_rest_comes_back(monkeypatch):
    run, request_id, prompt = preempted_once()
    copies = []
    monkeypatch.setattr(run.engine._runner._host, "restore", copies.append)
    run.step()
    [copy] = copies
    assert copy.slots == (2,), "two full pages were in the cache"


def test_pages_that_are_older_than_the_weights_stay_out_of_the_cache():
    run, request_id, prompt = preempted_once()
    run.engine.forget_prefixes()
    run.run()
    check(run.events[request_id], prompt, 20)
    assert run.engine.stats()["swapped_in"] == 1
    [events] = run.run(request_for(prompt, max_tokens=1))
    assert events[0].cached_tokens == 0


def test_pages_of_a_request_that_outlived_a_change_stay_out_of_the_cache_too():
    """It changed while the request was running; only then was it preempted."""
    run, prompt = driver(), prompt_of(40)
    request_id = run.add(request_for(prompt, max_tokens=20))
    run.step(4)
    run.engine.forget_prefixes()
    scheduler = run.engine._scheduler
    scheduler._preempt(scheduler.running[0])
    run.run()
    check(run.events[request_id], prompt, 20)
    [events] = run.run(request_for(prompt, max_tokens=1))
    assert events[0].cached_tokens == 0


def test_old_pages_are_not_mixed_with_new_ones():
    """What others have cached since belongs to other weights."""
    run, request_id, prompt = preempted_once()
    run.engine.forget_prefixes()
    swapped = run.engine._scheduler.waiting[0]
    other = run.add(request_for(prompt, max_tokens=1, priority=-1))
    run.step()
    assert run.events[other][-1] == FinishEvent("length", 1)
    assert swapped.held.pages and not set(swapped.held.pages) & set(
        run.engine._scheduler.pages.prefix._by_page
    )
    run.run()
    check(run.events[request_id], prompt, 20)


def test_a_request_that_fails_after_coming_back_leaves_nothing():
    run, request_id, _ = preempted_once()
    bad = run.add(request_for([5, NAN_ID, 6], max_tokens=20))
    run.run()
    assert isinstance(run.events[bad][-1], ErrorEvent) and nothing_is_held(run.engine)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Faster for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swapping")
    base = write_tiny("llama", folder / "tiny.gguf", type_name="Q8_0")
    save_adapter(base, folder / "a", seed=1)
    save_adapter(base, folder / "b", seed=2, r=9, targets=["q_proj", "up_proj"])
    return folder


CHOICES = [None, "a", [("b", 0.5), ("a", -1.0)], "b"]
PROMPTS = [[7 + (i * 31 + j * j) % 300 for j in range(30 + 5 * i)] for i in range(4)]
PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True, logprobs=2)


def outputs(folder, **config):
    """(tokens and log-probabilities of all requests at once, the engine's figures)."""
    base = {"device": "cpu", "numerics": "invariant", "page_size": 16, "max_batch_size": 4}
    with LLM(folder / "tiny.gguf", **{**base, **config}) as llm:
        for name in ("a", "b"):
            llm.load_adapter(name, folder / name)
        llm.generate(PROMPTS[:2], SamplingParams(max_tokens=1))
        handles = [
            llm.engine.submit(
                GenerationRequest(
                    prompt_token_ids=tuple(prompt), params=PARAMS, adapters=llm._pairs(choice)
                )
            )
            for prompt, choice in zip(PROMPTS, CHOICES)
        ]
        return [list(handle.events())[1:] for handle in handles], llm.engine.stats()


@pytest.mark.parametrize(
    "options", [{}, {"prefix_cache": False}, {"kv_dtype": "q8_0"}], ids=["", "no-cache", "q8_0"]
)
def test_same_bits_undisturbed_recomputed_and_swapped(folder, options):
    alone, _ = outputs(folder, kv_pages=200, **options)
    recomputed, again = outputs(folder, kv_pages=10, **options)
    swapped, stats = outputs(folder, kv_pages=10, preemption="swap", **options)
    assert alone == recomputed == swapped
    assert again["preemptions"] > 0 and stats["swapped_in"] > 0 == stats["swap_refused"]
