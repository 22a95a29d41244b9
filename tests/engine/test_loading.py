"""What ``auto`` means, and what the configuration does to an engine that is loaded from a file."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig, demo_model_path
from oxillama_torch.engine.loading import load_engine, resolve
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels import registry


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_tiny("llama", path)
    with read_gguf(path) as gguf:
        yield gguf


@pytest.fixture
def rules():
    before = registry.active_rules()
    yield
    registry.set_rules(before)


def load(gguf, **config):
    return load_engine(
        EngineConfig(device="cpu", kv_pages=8, **config), gguf, eos_ids=frozenset({1})
    )


def test_auto_on_a_machine_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = torch.device("cpu")
    assert resolve(EngineConfig()) == (cpu, torch.float32, "invariant")
    asked = EngineConfig(dtype="bfloat16", numerics="fast")
    assert resolve(asked) == (cpu, torch.bfloat16, "fast")
    with pytest.raises(UnsupportedError, match="device 'cuda'; supported: cpu"):
        resolve(EngineConfig(device="cuda"))


def test_auto_on_a_machine_with_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve(EngineConfig()) == (torch.device("cuda"), torch.bfloat16, "fast")
    assert resolve(EngineConfig(device="cuda:1", numerics="invariant"))[2] == "invariant"
    assert resolve(EngineConfig(device="cpu"))[1] == torch.float32
    with pytest.raises(UnsupportedError, match="cuda:0, cuda:1"):
        resolve(EngineConfig(device="cuda:2"))


def test_context_is_bounded_by_model_and_pages(tiny):
    assert load(tiny).max_context == 8 * 32
    assert load(tiny, max_context=100).max_context == 100
    assert load(tiny, max_context=10**6, page_size=128).max_context == 512


def test_kernel_rules_take_effect_and_show_in_the_fingerprint(tiny, rules, monkeypatch):
    plain = load(tiny).fingerprint
    monkeypatch.setenv("OXILLAMA_KERNELS", "attention=reference")
    from_environment = load(tiny).fingerprint
    assert registry.active_rules() and from_environment != plain
    assert load(tiny, kernels="").fingerprint == plain and not registry.active_rules()
    with pytest.raises(UnsupportedError):
        load(tiny, kernels="attention=imaginary")


def test_a_kernel_that_was_asked_for_need_not_serve_the_types_of_norms(rules, monkeypatch):
    """The demo model's norms are F32, its matrices Q8_0."""
    registry.candidates("quant_matmul", registry.Call("cpu", torch.float32))  # what ships, for good
    monkeypatch.setattr(registry, "_KERNELS", {op: dict(k) for op, k in registry._KERNELS.items()})
    reference = registry._KERNELS["quant_matmul"]["reference"].function
    registry.register("quant_matmul", "mine", types={"Q8_0"})(reference)
    registry.register("quant_matmul", "other", types={"Q4_K"})(reference)
    with read_gguf(demo_model_path()) as demo:
        plain, mine = (load(demo, kernels=rule).fingerprint for rule in ("", "quant_matmul=mine"))
        assert mine != plain
        with pytest.raises(UnsupportedError, match="other serves Q4_K, not Q8_0"):
            load(demo, kernels="quant_matmul=other")


def test_threads_are_set(tiny):
    before = torch.get_num_threads()
    try:
        load(tiny, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
