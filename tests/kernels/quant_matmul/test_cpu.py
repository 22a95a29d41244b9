"""kernels/quant_matmul/cpu.py. Oracle: float64 products with gguf-py's values."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.quant_matmul import cpu
from oxillama_torch.kernels.registry import Call

TYPES = sorted(cpu.TYPES)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (135, 768), (1100, 512)])
def test_error_is_that_of_bfloat16(type_name, rows, columns, pack, activations):
    weight, values = pack(type_name, rows, columns)
    x, bias = activations(9, columns), torch.randn(rows)
    got = cpu.quant_matmul(x, weight, bias).double()
    truth = x.double() @ values.T + bias.double()
    assert got.shape == truth.shape
    assert (got - truth).norm() / truth.norm() < 5e-3


@pytest.mark.parametrize("type_name", TYPES)
def test_rows_keep_their_bits_in_every_batch(type_name, pack, activations):
    weight, _ = pack(type_name, 135, 768)
    x = activations(150, 768)
    whole = cpu.quant_matmul(x, weight)
    for start, stop in [(0, 1), (1, 3), (2, 6), (5, 13), (7, 23), (16, 81), (149, 150)]:
        assert torch.equal(cpu.quant_matmul(x[start:stop], weight), whole[start:stop])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(cpu.quant_matmul(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


def _choice(dtype, numerics, type_name="Q4_K"):
    return registry.select("quant_matmul", Call("cpu", dtype, numerics, type_name)).backend


def test_it_serves_fast_numerics_only():
    """Invariant numerics do not round scales, whatever the activations are."""
    assert _choice(torch.float32, "fast") == "cpu"
    assert _choice(torch.float32, "invariant") != "cpu"
    assert _choice(torch.bfloat16, "invariant") != "cpu"
    assert _choice(torch.float32, "fast", "Q8_0") != "cpu"


def test_packing_goes_with_the_weight(pack):
    weight, _ = pack("Q4_0", 16, 64)
    cpu.prepare([weight])
    before = len(cpu._packed)
    del weight
    assert len(cpu._packed) == before - 1
