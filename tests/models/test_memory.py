"""The memory plan against what a loaded model holds."""

from __future__ import annotations

import pytest
import torch
from paged_runner import PagedRunner
from tiny_models import write_tiny

from oxillama_torch.bench.synthetic import write_synthetic
from oxillama_torch.engine.loading import prepare_kernels, weights_of
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.quant_matmul import compiled, dense, factored
from oxillama_torch.kernels.quant_matmul.kept import kept_bytes
from oxillama_torch.models.config import ModelConfig
from oxillama_torch.models.loader import load_model
from oxillama_torch.models.memory import memory_plan


@pytest.mark.parametrize(
    ("arch", "type_name", "overrides"),
    [
        ("llama", "F32", {}),
        ("llama-tied", "Q8_0", {}),
        ("mixtral", "Q4_0", {}),
        ("qwen3moe", "Q5_1", {"hidden_size": 96, "moe_intermediate_size": 32}),
    ],
)
def test_plan_is_exact_for_weights_and_pages(arch, type_name, overrides, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name=type_name, **overrides)
    with read_gguf(tmp_path / "tiny.gguf") as file:
        config = ModelConfig.from_metadata(Metadata(file.metadata))
        plan = memory_plan(file, config)
        decoder = load_model(file)
    assert plan.weights_bytes == _held_bytes(decoder)
    runner = PagedRunner(decoder, num_pages=2, page_size=16)
    pages_bytes = sum(pages.nbytes for layer in runner.kv for pages in layer)
    assert plan.kv_bytes_per_token * 32 == pages_bytes
    assert plan.total_bytes(32) == plan.weights_bytes + plan.workspace_bytes + pages_bytes


def test_half_precision_halves_the_pages(tmp_path):
    write_tiny("llama", tmp_path / "tiny.gguf")
    with read_gguf(tmp_path / "tiny.gguf") as file:
        config = ModelConfig.from_metadata(Metadata(file.metadata))
        wide, half = (
            memory_plan(file, config, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
        )
    assert wide.kv_bytes_per_token == 2 * half.kv_bytes_per_token == 2 * 2 * 64 * 4


def _held_bytes(decoder: torch.nn.Module) -> int:
    """Bytes of everything that came from the file, each storage once."""
    held = {}
    for module in decoder.modules():
        values = [*vars(module).values(), *module._buffers.values()]
        for value in values:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, PackedTensor):
                    for plane in item.planes.values():
                        held[plane.data_ptr()] = plane.untyped_storage().nbytes()
                elif isinstance(item, torch.Tensor):
                    held[item.data_ptr()] = item.nbytes
    return sum(held.values()) - decoder.layers[0].attention.rope.inv_freq.nbytes


@pytest.mark.parametrize(("mix", "numerics"), [("q4_0", "fast"), ("q4_k_m", "fast")])
def test_packed_4_bit_forms_of_fast_numerics_are_planned(mix, numerics, tmp_path):
    plan, weights = _planned_and_prepared(tmp_path / "small.gguf", mix, numerics)
    packed = sum(w.shape[0] * w.shape[1] for w in weights if w.type_name in ("Q4_0", "Q4_K"))
    assert plan.kept_bytes == kept_bytes(weights) == pytest.approx(packed * 5 / 8, rel=0.01)
    assert plan.total_bytes(0) == plan.weights_bytes + plan.kept_bytes + plan.workspace_bytes


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
def test_forms_of_large_models_are_planned(numerics, tmp_path, monkeypatch):
    """Those that compiled products read, where compiling pays: a lower bound makes it so here."""
    monkeypatch.setattr(compiled, "MIN_WEIGHTS", 1000)
    monkeypatch.setattr(compiled, "_try", lambda weight: None)  # compiling takes seconds
    monkeypatch.setattr(factored, "_try", lambda weight: None)
    monkeypatch.setattr(dense, "prepare", lambda weights: None)
    for module in (compiled, factored):
        monkeypatch.setattr(module, "_ready", set())
    plan, weights = _planned_and_prepared(tmp_path / "small.gguf", "q4_k_m", numerics)
    registry.forget_choices()
    assert plan.kept_bytes == kept_bytes(weights) > 0
    if numerics == "invariant":  # of Q6_K: a byte a weight, and a float32 scale for 16 of them
        taken_apart = sum(w.shape[0] * w.shape[1] for w in weights if w.type_name == "Q6_K")
        assert plan.kept_bytes == pytest.approx(taken_apart * (1 + 4 / 16), rel=0.01)


def test_nothing_is_kept_of_small_models_or_on_a_gpu(tmp_path):
    plan, weights = _planned_and_prepared(tmp_path / "small.gguf", "q4_k_m", "invariant")
    assert plan.kept_bytes == kept_bytes(weights) == 0
    with read_gguf(tmp_path / "small.gguf") as file:
        config = ModelConfig.from_metadata(Metadata(file.metadata))
        on_gpu = {"device": "cuda", "dtype": torch.bfloat16, "numerics": "fast"}
        assert memory_plan(file, config, **on_gpu).kept_bytes == 0


def _planned_and_prepared(path, mix, numerics):
    """The plan, and the weights of the model once it is loaded and its kernels are ready."""
    write_synthetic(path, "tiny", mix)
    with read_gguf(path) as file:
        config = ModelConfig.from_metadata(Metadata(file.metadata))
        plan = memory_plan(file, config, numerics=numerics)
        decoder = load_model(file, numerics=numerics)
    prepare_kernels(decoder)
    return plan, weights_of(decoder)
