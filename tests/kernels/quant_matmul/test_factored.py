"""kernels/quant_matmul/factored.py. Oracle: float64 products with gguf-py's values.

Compiling takes many seconds: by default the programs of most types run eagerly, as Python says
them; one type is compiled, the others under ``-m slow``.
"""

from __future__ import annotations

import shutil

import pytest
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.quant_matmul import compiled, dense, factored
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import Call, use_kernels

TYPES = sorted(factored.TYPES)
COMPILED = ["Q4_K", *(pytest.param(t, marks=pytest.mark.slow) for t in TYPES if t != "Q4_K")]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# Float32 sums; offsets of up to 128 are added to the quants and taken off the sums again.
ERROR = 5e-6


@pytest.fixture(autouse=True)
def unprepared(monkeypatch):
    """Nothing prepared before or left behind."""
    monkeypatch.setattr(factored, "_ready", set())
    monkeypatch.setattr(factored, "_broken", {})
    monkeypatch.setattr(compiled, "_ready", set())
    registry.forget_choices()
    yield
    registry.forget_choices()


@pytest.fixture
def eager(monkeypatch):
    caches = (factored._inputs, factored._product, factored._decode)
    monkeypatch.setattr(factored, "_program", lambda function, name, shapes, dtypes=None: function)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def relative_error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("type_name", TYPES)
def test_products_are_the_reference_s_but_for_the_order_of_sums(
    type_name, lanes, pack, activations, eager, monkeypatch
):
    """Rows of one tile and more; inputs that do not fill the last chunk; odd outputs."""
    monkeypatch.setattr(factored, "_lanes", lambda: lanes)
    weight, values = pack(type_name, 37, 768)
    x, bias = activations(9, 768), torch.randn(37)
    wanted = x.double() @ values.T + bias.double()
    for rows in (1, 2, 4, 9):
        got = factored.quant_matmul(x[:rows], weight, bias)
        assert got.shape == (rows, 37) and got.dtype == torch.float32
        assert relative_error(got, wanted[:rows]) < ERROR
    half = factored.quant_matmul(x.bfloat16(), weight, bias)
    assert half.dtype == torch.bfloat16
    rounded = x.bfloat16().double() @ values.T + bias.double()
    assert relative_error(half, rounded) < 2**-8


@pytest.mark.parametrize("type_name", TYPES)
def test_decoded_rows_are_the_weights_in_the_order_of_the_inputs(
    type_name, pack, activations, eager
):
    weight, values = pack(type_name, 12, 768)
    order = factored.permuted(torch.arange(1.0, 769.0)[None], type_name).flatten()
    out = torch.full((8, len(order)), torch.nan)
    rows = factored.decode_rows(weight, 3, 10, out)
    assert rows.shape == (7, len(order)) and rows.data_ptr() == out.data_ptr()
    kept = order > 0
    assert kept.sum() == 768 and (rows[:, ~kept] == 0).all()
    wanted = values[3:10][:, order[kept].long() - 1]
    torch.testing.assert_close(rows[:, kept].double(), wanted, rtol=1e-5, atol=1e-6)


def test_more_rows_than_are_packed_at_once(pack, activations, eager):
    weight, values = pack("Q4_0", 1030, 64)
    x = activations(1, 64)
    assert relative_error(factored.quant_matmul(x, weight), x.double() @ values.T) < ERROR


def test_words_go_with_the_weight(pack, activations, eager):
    weight, _ = pack("Q6_K", 16, 256)
    factored.quant_matmul(activations(1, 256), weight)
    before = len(factored._packed)
    del weight
    assert len(factored._packed) == before - 1


@needs_compiler
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("type_name", COMPILED)
def test_compiled(type_name, pack, activations):
    weight, values = pack(type_name, 37, 1536)
    x = activations(5, 1536)
    with use_kernels("quant_matmul=factored"):
        for rows in (1, 5):
            y = quant_matmul(x[:rows], weight, numerics="fast")
            assert relative_error(y, x[:rows].double() @ values.T) < ERROR


@needs_compiler
def test_it_serves_what_was_prepared_and_fast_numerics_alone(pack, eager, monkeypatch):
    monkeypatch.setattr(factored, "_has_avx512", lambda: False)
    monkeypatch.setattr(factored, "_lanes", lambda: 8)
    weights = [pack(name, 64, 512)[0] for name in ("Q4_K", "Q6_K", "IQ1_S")]

    def chosen(type_name, numerics="fast"):
        call = Call("cpu", torch.float32, numerics, type_name)
        return registry.select("quant_matmul", call).backend

    factored.prepare(weights)
    assert (chosen("Q4_K"), chosen("Q6_K")) == ("cpu", "reference")
    factored.prepare(weights, even_if_small=True)
    assert (chosen("Q4_K"), chosen("Q6_K")) == ("factored", "factored")
    assert chosen("Q4_K", "invariant") == chosen("IQ1_S") == "reference"
    registry.forget_choices()
    monkeypatch.setattr(factored, "_has_avx512", lambda: True)
    assert (chosen("Q4_K"), chosen("Q6_K")) == ("cpu", "factored")


@needs_compiler
def test_a_rule_prepares_small_models_too(pack, eager):
    weight = pack("Q6_K", 64, 512)[0]
    with use_kernels("quant_matmul.q6_k=factored"):
        factored.prepare([weight])
    assert factored.serves("Q6_K")


@needs_compiler
@pytest.mark.parametrize("wrong", ["result", "compiler"])
def test_what_does_not_work_here_is_refused_with_the_reason(wrong, pack, eager, monkeypatch):
    def program(function, name, shapes, dtypes=None):
        def run(*arguments):
            if wrong == "compiler":
                raise RuntimeError("no such instruction\nmore")
            result = function(*arguments)
            return result + 1 if isinstance(result, torch.Tensor) else result

        return run

    monkeypatch.setattr(factored, "_program", program)
    weight, _ = pack("Q6_K", 64, 512)
    factored.prepare([weight], even_if_small=True)
    call = Call("cpu", torch.float32, "fast", "Q6_K")
    assert registry.select("quant_matmul", call).backend == "reference"
    reasons = {k.backend: reason for k, reason in registry.candidates("quant_matmul", call)}
    expected = {"result": "does not agree with the reference", "compiler": "no such instruction"}
    assert expected[wrong] in reasons["factored"]


@needs_compiler
def test_dense_products_read_the_words(pack, activations, eager, monkeypatch):
    """More outputs than a chunk holds, and not a multiple of it."""
    weight, values = pack("Q6_K", 530, 768)
    factored.prepare([weight], even_if_small=True)
    x, bias = activations(40, 768), torch.randn(530)
    wanted = x.double() @ values.T + bias.double()
    for dtype, least, most in ((torch.float32, 0, ERROR), (torch.bfloat16, 1e-4, 6e-3)):
        monkeypatch.setattr(dense, "_cpu_dtype", lambda dtype=dtype: dtype)
        assert least <= relative_error(dense.quant_matmul(x, weight, bias), wanted) < most
