"""Adapters of every kind with every op in Triton, interpreted.

Oracle: the same decoder with the reference kernels, which is held against peft elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from adapter_runner import AdapterRunner, open_tiny, table_of
from tiny_adapters import WHOLE_MODEL, save_adapter

from oxillama_torch.kernels.registry import use_kernels

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU only"),
]

OPS = (
    "quant_matmul", "quant_matmul_experts", "embedding", "rms_norm", "rope_store_kv", "attention",
    "gated", "lora",
)  # fmt: skip
TRITON = ",".join(f"{op}=triton" for op in OPS)
IDS = torch.randint(0, 389, (11,), generator=torch.Generator().manual_seed(1)).tolist()
SMALL = {"num_hidden_layers": 1, "hidden_size": 128}


def run(decoder, targets, uses):
    runner = AdapterRunner(decoder, targets, uses)
    first = runner.step({"a": IDS[:5], "none": IDS[:3]})
    second = runner.step({"b": IDS[3:7], "a": IDS[5:6]})
    return torch.cat([first["a"], second["a"]]), torch.cat([first["none"], second["b"]])


@pytest.mark.parametrize("name", ["dora", "saved", "saved-linear", "experts"])
def test_triton_equals_the_reference_and_itself_alone(name, tmp_path):
    arch, options = WHOLE_MODEL[name]
    oracle, decoder, targets = open_tiny(arch, tmp_path, type_name="Q8_0", **SMALL)
    save_adapter(oracle, tmp_path / "adapter", **options)
    table = table_of(tmp_path / "adapter", targets)
    uses = {"a": [(table, 0.7)], "b": [(table, 1.0)], "none": []}
    wanted = run(decoder, targets, uses)
    with use_kernels(TRITON):
        got = run(decoder, targets, uses)
        alone = AdapterRunner(decoder, targets, uses).run("a", IDS[:6])
    for mine, reference in zip(got, wanted):
        assert (mine - reference).norm() / reference.norm() < 1e-5
    assert torch.equal(got[0], alone)
