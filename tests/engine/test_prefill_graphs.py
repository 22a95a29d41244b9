"""Short prompts as graphs: the bits of the plain path, padded or not.

Oracle: the same requests in an engine that launches every step kernel by kernel, compared with
``==``, log-probabilities and hidden states too. Graphs are recorded by ``RecordedCalls``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_driver import Driver, request_for
from hypothesis import given
from hypothesis import strategies as st
from recorded_calls import RecordedCalls
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.prefill_graphs import token_counts
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels.registry import observed
from oxillama_torch.models.loader import load_model


@pytest.fixture(scope="module", params=["llama", "qwen3moe"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(request.param, path, type_name="F32")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with read_gguf(path) as gguf:
        yield load_model(gguf)
    torch.set_num_threads(threads)


def driver(model, device=None, **config) -> Driver:
    config = EngineConfig(**{"page_size": 16, "kv_pages": 64, "max_batch_size": 2, **config})
    return Driver(Engine(model, config, graphs=device))


def prompt(length: int) -> list[int]:
    return [8 + 7 * i % 300 for i in range(length)]


def requests():
    for length in (1, 15, 16, 17, 32, 40, 70):
        yield request_for(prompt(length), max_tokens=3, logprobs=2, temperature=1.0, seed=length)
    yield request_for(prompt(21), max_tokens=2, prompt_logprobs=1)
    yield request_for(prompt(9), max_tokens=0, capture="hidden", pooling="mean")
    yield request_for(prompt(60), max_tokens=2, top_k=3, logprobs=0)  # its prefix is cached


def same(found, wanted) -> None:
    for mine, other in zip(found, wanted, strict=True):
        assert type(mine) is type(other)
        if getattr(mine, "captured", None) is not None:
            assert np.array_equal(mine.captured, other.captured)
        else:
            assert mine == other


@pytest.mark.parametrize("budget", [512, 24])
def test_bits_are_those_of_the_plain_path(model, budget):
    """Whole prompts, chunks of them, what a prefix was cached for; every kind of output."""
    plain = driver(model, max_batch_tokens=budget)
    run = driver(model, RecordedCalls(), max_batch_tokens=budget)
    for one, other in zip(requests(), requests()):
        same(run.run(one)[0], plain.run(other)[0])
    stats = run.engine.stats()
    assert stats["graph_prompts"] >= 7 and plain.engine.stats()["graph_prompts"] == 0
    assert stats["graphs"] <= 4 + 2 + 1, "prompts, lines, lines with a penalty"


def test_others_in_the_batch_change_no_bit_and_take_the_plain_path(model):
    wanted = driver(model).run(request_for(prompt(9), max_tokens=12, logprobs=1))[0]
    run = driver(model, RecordedCalls())
    first = run.add(request_for(prompt(9), max_tokens=12, logprobs=1))
    run.step(4)
    before = run.engine.stats()["graph_prompts"]
    assert before == 1
    run.run(request_for(prompt(20)[::-1], max_tokens=3))
    same(run.events[first], wanted)
    assert run.engine.stats()["graph_prompts"] == before, "with a line that decodes"


def test_recorded_at_the_start_dropped_and_switched_off(model):
    device, seen = RecordedCalls(), []
    run = driver(model, device, graph_prompt_tokens=40)
    run.engine.capture_graphs(lambda *done: seen.append(done))
    assert seen == [(i + 1, 5) for i in range(5)], "of 2 and 1 lines; of 40, 32 and 16 tokens"
    run.run(request_for(prompt(33), max_tokens=2), request_for(prompt(41)[::-1], max_tokens=2))
    assert device.captures == 5
    device.invalidate()
    run.engine.forget_prefixes()
    same(run.run(request_for(prompt(5), max_tokens=2))[0],
         driver(model).run(request_for(prompt(5), max_tokens=2))[0])  # fmt: skip
    assert run.engine.stats()["graphs"] == 2
    with observed(lambda kernel, call: kernel):
        run.run(request_for(prompt(6), max_tokens=2))
    assert run.engine.stats()["graph_prompts"] == 1
    off = driver(model, RecordedCalls(), graph_prompt_tokens=0)
    off.run(request_for(prompt(5), max_tokens=2))
    assert off.engine.stats()["graph_prompts"] == 0
    with pytest.raises(UnsupportedError, match="graph_prompt_tokens"):
        EngineConfig(graph_prompt_tokens=-1)


def test_padding_stays_within_the_pages_that_a_request_may_have(model):
    seen = []

    def watched(batch, kv):
        table = batch.page_table.shape[1] * 16
        seen.append(batch.seq_lens.tolist())
        assert max(seen[-1]) <= batch.max_seq_len <= table
        return model.forward(batch, kv)

    plain = driver(model, max_context=48).run(request_for(prompt(5), max_tokens=2))[0]
    run = driver(model, RecordedCalls(), max_context=48)
    run.engine._graphs._prefill._model = watched
    same(run.run(request_for(prompt(5), max_tokens=2))[0], plain)
    run.engine.capture_graphs()
    run.run(request_for(prompt(40)[::-1], max_tokens=2))
    assert seen[-1] == [40, 8]


@given(st.integers(1, 1000))
def test_token_counts(most):
    counts = token_counts(most)
    assert counts == sorted(set(counts)) and counts[-1] == most
    assert all(count == 16 << i for i, count in enumerate(counts[:-1]))
