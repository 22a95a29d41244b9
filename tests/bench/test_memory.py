"""Planned and used memory, with the figures of the driver scripted.

Oracle: the sizes of the tensors of an engine that was loaded.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_tiny

from oxillama_torch.bench import memory
from oxillama_torch.bench.memory import MemoryWatch, planned_bytes
from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.loading import load_engine, weights_of
from oxillama_torch.gguf.reader import read_gguf


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny("llama", path, type_name="Q8_0")
    return EngineConfig(model=path, device="cpu", page_size=16, kv_pages=40, max_batch_size=4)


def test_the_plan_holds_weights_and_pages_and_something_to_work_with(config):
    with read_gguf(config.model_path) as gguf:
        engine = load_engine(config, gguf, eos_ids=frozenset())
    weights = sum(weight.nbytes for weight in weights_of(engine.model))
    pages = sum(heads * (key + value) for heads, key, value in engine.model.kv_shapes())
    exact = weights + 40 * 16 * pages * 4
    planned = planned_bytes(config, 40 * 16)
    assert exact < planned
    assert planned_bytes(config, 80 * 16) - planned == 40 * 16 * pages * 4


def test_used_is_what_the_device_has_lost_since(config, monkeypatch):
    monkeypatch.setattr(
        memory, "resolve", lambda config: (torch.device("cuda"), torch.bfloat16, "fast")
    )
    planned = planned_bytes(config, 640)
    left = iter([10 * planned, 10 * planned - int(1.02 * planned)])
    watch = MemoryWatch(config, free=lambda device: next(left))
    figures = watch.figures(640)
    assert figures["planned_bytes"] == planned and figures["used_bytes"] == int(1.02 * planned)
    assert figures["used_beyond_plan"] == pytest.approx(0.02, abs=1e-4)


def test_nothing_is_said_of_a_cpu(config):
    assert MemoryWatch(config).figures(640) == {}
