"""Bit-exact inference: a request's tokens and log-probabilities do not depend on its company.

The oracle is the request alone in a fresh engine; everything is compared with ``==``, floats too.
Models: tiny random llama and qwen3moe (experts) from GGUF files.
"""

from __future__ import annotations

import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.loader import load_model

#: Around the page size (16), the tile sizes of the kernels (16, 32) and the chunk sizes below.
LENGTHS = (1, 2, 5, 8, 15, 16, 17, 3, 31, 32, 33, 4, 40, 6, 21, 10)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Faster for models this small; one test runs with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "qwen3moe"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(request.param, path, type_name="Q8_0")
    with read_gguf(path) as gguf:
        return load_model(gguf)


def requests():
    """16 requests, no two alike: greedy and drawn, with and without prompt log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    for index, length in enumerate(LENGTHS):
        prompt = torch.randint(5, 380, (length,), generator=generator).tolist()
        yield request_for(
            prompt,
            max_tokens=6,
            seed=index,
            temperature=0 if index % 2 else 1.0,
            top_p=0.9 if index % 3 else 1.0,
            repetition_penalty=1.2 if index % 4 == 0 else 1.0,
            logprobs=2,
            prompt_logprobs=1 if index % 5 == 0 else None,
        )


def driver(model, **config) -> Driver:
    return Driver(Engine(model, EngineConfig(**{"page_size": 16, "kv_pages": 256, **config})))


def results(run: Driver) -> list:
    """Prompt log-probabilities, tokens, log-probabilities and end of each request."""
    return [(events[0].logprobs, events[1:]) for events in run.run(*requests())]


@pytest.fixture(scope="module")
def alone(model) -> list:
    run = driver(model, prefix_cache=False)
    outputs = [run.run(request)[0] for request in requests()]
    assert all(len(tokens_of(events)) == 6 for events in outputs)
    return [(events[0].logprobs, events[1:]) for events in outputs]


def test_in_a_mixed_batch_of_16(model, alone):
    run = driver(model)
    assert results(run) == alone and run.engine.stats()["steps"] <= 7


def test_with_two_torch_threads(model, alone):
    torch.set_num_threads(2)
    try:
        assert results(driver(model)) == alone
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("budget", [5, 17])
def test_in_chunks(model, alone, budget):
    assert results(driver(model, max_batch_tokens=budget)) == alone


def test_on_a_warm_prefix_cache(model, alone):
    run = driver(model)
    assert results(run) == alone
    cold_hits = run.engine.stats()["prefix_hit_tokens"]
    assert results(run) == alone
    assert cold_hits == 0 and run.engine.stats()["prefix_hit_tokens"] >= 5 * 16


class Preempting(Driver):
    """Every third step the latest request loses its pages and has to come back."""

    def step(self, count: int = 1) -> None:
        super().step(count)
        scheduler = self.engine._scheduler
        if self.engine.stats()["steps"] % 3 == 0 and scheduler.running:
            scheduler._preempt(scheduler.running[-1])


@pytest.mark.parametrize("kv_dtype", ["f16", "fp8", "q8_0", "q4_0"])
def test_with_smaller_keys_and_values(model, kv_dtype):
    """In a batch, in chunks, from the prefix cache and after preemption, as alone."""
    one_by_one = driver(model, prefix_cache=False, kv_dtype=kv_dtype)
    expected = [one_by_one.run(request)[0] for request in requests()]
    expected = [(events[0].logprobs, events[1:]) for events in expected]
    run = Preempting(driver(model, max_batch_tokens=17, kv_dtype=kv_dtype).engine)
    assert results(run) == expected
    assert results(run) == expected
    stats = run.engine.stats()
    assert stats["prefix_hit_tokens"] > 0 and stats["preemptions"] > 2


@pytest.mark.parametrize("prefix_cache", [False, True], ids=["recomputed", "from cache"])
def test_after_preemption(model, alone, prefix_cache):
    run = Preempting(driver(model, max_batch_tokens=64, prefix_cache=prefix_cache).engine)
    assert results(run) == alone and run.engine.stats()["preemptions"] > 2
