"""Sizes of graphs, who uses them, and the real thing on a GPU.

Oracle of the GPU test: the same requests in an engine that launches every step kernel by kernel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_driver import Driver, request_for
from hypothesis import given
from hypothesis import strategies as st
from recorded_calls import RecordedCalls
from tiny_adapters import save_adapter
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine import loading
from oxillama_torch.engine.graphs import CudaGraphs, line_counts, reaches
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.memory import graph_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@given(st.integers(1, 600))
def test_line_counts(most):
    counts = line_counts(most)
    assert counts == sorted(set(counts)) and counts[-1] == most
    small = [n for n in (1, 2, 4, 8) if n < most]
    assert counts[: len(small)] == small
    assert all(n % 8 == 0 for n in counts[len(small) : -1])


def test_the_longest_reach_is_the_context():
    assert reaches(512) == [512]
    assert reaches(2048) == [2048]
    assert reaches(131072) == [2048, 16384, 131072]


def test_who_uses_graphs():
    assert loading.uses_graphs(EngineConfig(), GPU)
    assert not loading.uses_graphs(EngineConfig(), CPU)
    assert not loading.uses_graphs(EngineConfig(graphs="off"), GPU)
    with pytest.raises(UnsupportedError, match="graphs on cpu"):
        loading.uses_graphs(EngineConfig(graphs="on"), CPU)
    with pytest.raises(UnsupportedError, match="graphs"):
        EngineConfig(graphs="sometimes")
    with pytest.raises(UnsupportedError, match="graph_batch_size"):
        EngineConfig(graph_batch_size=0)


def test_graphs_are_recorded_while_a_model_is_loaded(tmp_path, monkeypatch):
    write_tiny("llama", tmp_path / "tiny.gguf", type_name="Q8_0")
    monkeypatch.setattr(loading, "uses_graphs", lambda config, device: True)
    monkeypatch.setattr(loading, "CudaGraphs", lambda device: RecordedCalls())
    config = EngineConfig(
        model=tmp_path / "tiny.gguf", device="cpu", page_size=16, kv_pages=16, max_batch_size=2
    )
    seen = []
    with read_gguf(config.model_path) as gguf:
        engine = loading.load_engine(
            config, gguf, eos_ids=frozenset(), recording=lambda *done: seen.append(done)
        )
    assert seen == [(i + 1, 6) for i in range(6)], "of 2 and 1 lines; of 128 to 16 tokens"
    stats = engine.stats()
    assert stats["graphs"] == 6 and stats["graph_steps"] == 0
    assert 0 < stats["graph_bytes"] <= graph_bytes(engine.model.config, 2), "as planned"
    with torch.inference_mode():
        [events] = Driver(engine).run(request_for([5, 6, 7], max_tokens=6))
    assert len(events) == 8 and engine.stats()["graphs"] == 6, "nothing else was needed"
    assert engine.stats()["graph_prompts"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_on_a_gpu_bits_are_those_of_single_launches(arch, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0")
    config = {"model": tmp_path / "tiny.gguf", "device": "cuda", "numerics": "invariant"}
    config |= {"page_size": 16, "kv_pages": 64, "max_batch_size": 11}
    kinds = [{"temperature": 0}, {"top_p": 0.9, "logprobs": 2}, {"repetition_penalty": 1.3}]
    found = {}
    for graphs in ("off", "on"):
        with read_gguf(config["model"]) as gguf:
            engine = loading.load_engine(
                EngineConfig(graphs=graphs, **config), gguf, eos_ids=frozenset()
            )
        run = Driver(engine)
        requests = [
            request_for(
                [5 + i, *range(9, 9 + 5 * i)],
                **{"temperature": 1.0, "seed": i, "max_tokens": 10 + 4 * i, **kinds[i % 3]},
            )
            for i in range(11)
        ]
        with torch.inference_mode(), torch.cuda.device(0):
            found[graphs] = run.run(*requests)
    assert found["on"] == found["off"]
    assert engine.stats()["steps_ahead"] > 20


@pytest.mark.gpu
def test_on_a_gpu_adapters_give_the_bits_of_single_launches(tmp_path):
    oracle = write_tiny("llama", tmp_path / "tiny.gguf", type_name="Q8_0")
    for seed, name in enumerate(("a", "b")):
        save_adapter(oracle, tmp_path / name, seed=seed, r=4 + 16 * seed)
    config = {"model": tmp_path / "tiny.gguf", "device": "cuda", "numerics": "invariant"}
    config |= {"page_size": 16, "kv_pages": 64, "max_batch_size": 6}
    found = {}
    for graphs in ("off", "on"):
        with read_gguf(config["model"]) as gguf:
            engine = loading.load_engine(
                EngineConfig(graphs=graphs, **config), gguf, eos_ids=frozenset()
            )
        for name in ("a", "b"):
            engine.adapters.load(name, tmp_path / name)
        uses = [(), (("a", 1.0),), (("b", 0.5), ("a", -1.0))]
        requests = [
            replace(
                request_for([5 + i, *range(9, 9 + 5 * i)], max_tokens=10 + 4 * i, logprobs=1),
                adapters=uses[i % 3],
            )
            for i in range(6)
        ]
        with torch.inference_mode(), torch.cuda.device(0):
            found[graphs] = Driver(engine).run(*requests)
    assert found["on"] == found["off"]
    assert engine.stats()["steps_ahead"] > 10


@pytest.mark.gpu
def test_a_copy_is_what_was_there_when_it_began():
    device = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    x = torch.zeros(4, dtype=torch.float64, device="cuda")
    replay = device.capture(lambda: x.add_(1))
    x.zero_()
    reads = []
    for _ in range(3):
        replay()
        reads.append(device.fetch(x))
    assert [read() for read in reads] == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    device.finish()
    assert device.memory() >= 0
