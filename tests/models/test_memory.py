"""The memory plan against what a loaded model holds."""

from __future__ import annotations

import pytest
import torch
from paged_runner import PagedRunner
from tiny_models import write_tiny

from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kernels.formats import PackedTensor
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
