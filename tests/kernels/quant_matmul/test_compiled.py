"""kernels/quant_matmul/compiled.py. Oracle: float64 products with gguf-py's values.

Compiling takes seconds per type: one type by default, the others under ``-m slow``.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.quant_matmul import compiled
from oxillama_torch.kernels.quant_matmul.lanes import LANES
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import Call, use_kernels

TYPES = ["Q4_K", *(pytest.param(t, marks=pytest.mark.slow) for t in LANES if t != "Q4_K")]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def unprepared(monkeypatch):
    """No type compiled yet, none broken; choices made meanwhile are forgotten."""
    monkeypatch.setattr(compiled, "_ready", set())
    monkeypatch.setattr(compiled, "_broken", {})
    registry.forget_choices()
    yield
    registry.forget_choices()


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: None)


def chosen(type_name: str = "Q4_K") -> tuple[str, str]:
    kernel, reason = registry.explain("quant_matmul", Call("cpu", torch.float32, type=type_name))
    return kernel.backend, reason


@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("type_name", TYPES)
def test_right_and_the_same_bits_in_every_batch(
    type_name, unprepared, pack, activations, assert_close
):
    weight, values = pack(type_name, 135, 768)
    compiled.prepare([weight], even_if_small=True)
    assert chosen(type_name)[0] == "compiled"
    x, bias = activations(150, 768), torch.randn(135)
    whole = quant_matmul(x, weight, bias)
    assert_close(whole, x, values, bias)
    for start, stop in [(0, 1), (1, 3), (2, 6), (5, 13), (7, 23), (16, 81), (149, 150)]:
        assert torch.equal(quant_matmul(x[start:stop], weight, bias), whole[start:stop])
    assert torch.equal(quant_matmul(x.flip(0), weight, bias), whole.flip(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(quant_matmul(x, weight, bias), whole)
    finally:
        torch.set_num_threads(threads)
    half = quant_matmul(x[:2].bfloat16(), weight)
    assert half.dtype == torch.bfloat16
    assert_close(half, x[:2].bfloat16(), values)


@needs_compiler
def test_small_models_do_not_pay_for_compiling(unprepared, pack, monkeypatch):
    weight, _ = pack("Q4_K", 32, 256)
    monkeypatch.setattr(compiled, "_matmul", lambda x, weight: pytest.fail("compiled"))
    compiled.prepare([weight])
    backend, reason = chosen()
    assert backend == "reference"
    assert "compiled not compiled when the model was loaded" in reason


def test_large_models_do_unless_a_rule_names_another_backend(unprepared, pack, monkeypatch):
    weight, _ = pack("Q4_K", 32, 256)
    monkeypatch.setattr(compiled, "MIN_WEIGHTS", 32 * 256)
    monkeypatch.setattr(compiled, "compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(compiled, "_matmul", lambda x, weight: x.new_zeros(len(x), 32))
    with use_kernels("quant_matmul.q4_k=reference"):
        compiled.prepare([weight])
    assert chosen()[0] == "reference"
    compiled.prepare([weight])
    assert chosen()[0] == "compiled"
    assert chosen("Q8_0")[0] == "reference"


def test_without_a_compiler_the_reason_is_given(unprepared, no_compiler, pack):
    compiled.prepare([pack("Q4_K", 32, 256)[0]], even_if_small=True)
    backend, reason = chosen()
    assert backend == "reference"
    assert "compiled no C++ compiler found" in reason
    with (
        use_kernels("quant_matmul=compiled"),
        pytest.raises(UnsupportedError, match=r"no C\+\+ compiler found"),
    ):
        chosen()


@pytest.mark.parametrize(
    "matmul, reason",
    [
        (lambda x, weight: torch.rand(len(x), 32), "not invariant on this machine"),
        (lambda x, weight: (_ for _ in ()).throw(RuntimeError("bad g++")), "compiling failed: bad"),
    ],
    ids=["bits", "error"],
)
def test_what_fails_at_load_is_not_used(matmul, reason, unprepared, pack, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(compiled, "_matmul", matmul)
    compiled.prepare([pack("Q4_K", 32, 256)[0]], even_if_small=True)
    assert chosen()[0] == "reference"
    assert reason in chosen()[1]
    assert reason in caplog.text
