"""kernels/quant_matmul/dense.py on a CPU. Oracle: float64 products with gguf-py's values.

Compiling takes seconds per type: one type by default, the others under ``-m slow``.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.quant_matmul import compiled, dense
from oxillama_torch.kernels.quant_matmul.lanes import LANES
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import Call, use_kernels

TYPES = ["Q6_K", *(pytest.param(t, marks=pytest.mark.slow) for t in LANES if t != "Q6_K")]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def unprepared(monkeypatch):
    monkeypatch.setattr(dense, "_ready", set())
    registry.forget_choices()
    yield
    registry.forget_choices()


@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("rows", [70, 130])
def test_chunks_parts_and_bias_end_up_in_place(
    rows, type_name, dtype, pack, activations, monkeypatch
):
    """More rows of the weight than a chunk holds, and not a multiple of it; few are turned."""
    monkeypatch.setattr(dense, "_cpu_dtype", lambda: dtype)
    turned = dense._is_better_turned(torch.zeros(rows, 768, dtype=dtype))
    assert turned == (dtype == torch.float32 and rows == 70)
    weight, values = pack(type_name, 530, 768)
    x, bias = activations(rows, 768), torch.randn(530)
    wanted = x.double() @ values.double().T + bias.double()
    with use_kernels("quant_matmul=dense"):
        y = quant_matmul(x, weight, bias, numerics="fast")
        half = quant_matmul(x.bfloat16(), weight, bias, numerics="fast")
    assert y.dtype == torch.float32 and half.dtype == torch.bfloat16
    errors = [((got.double() - wanted).norm() / wanted.norm()).item() for got in (y, half)]
    if dtype == torch.float32:
        assert errors[0] < 1e-6 and errors[1] < 6e-3
    else:  # rounds by up to 2**-9
        assert all(1e-4 < error < 6e-3 for error in errors)


@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_serves_many_rows_of_what_was_prepared_and_fast_numerics_alone(pack, monkeypatch):
    weight, _ = pack("Q6_K", 32, 768)
    monkeypatch.setattr(compiled, "_ready", set())

    def chosen(m, numerics="fast"):
        call = Call("cpu", torch.float32, numerics, "Q6_K", m)
        return registry.select("quant_matmul", call).backend

    assert chosen(512) == "reference"
    dense.prepare([weight])
    assert (chosen(31), chosen(32), chosen(512)) == ("reference", "dense", "dense")
    assert chosen(512, "invariant") == "reference"


def test_without_a_compiler_nothing_is_prepared(pack, monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    dense.prepare([pack("Q6_K", 32, 768)[0]])
    call = Call("cpu", torch.float32, "fast", "Q6_K", 512)
    assert registry.select("quant_matmul", call).backend == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(pack, activations, dtype):
    weight, values = pack("Q4_K", 530, 768)
    x = activations(70, 768).to(dtype)
    with use_kernels("quant_matmul=dense"):
        y = quant_matmul(x.cuda(), weight.to("cuda"), numerics="fast").cpu()
    wanted = x.double() @ values.double().T
    assert (y.double() - wanted).norm() / wanted.norm() < 6e-3
