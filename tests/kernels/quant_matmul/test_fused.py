"""Fused products: several weights of one input, and the gated pair.

Oracle: float64 products with gguf-py's values; for bits, the products one by one.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.activation.op import gated
from oxillama_torch.kernels.quant_matmul import triton_gated_matmul, triton_gemm, triton_segments
from oxillama_torch.kernels.quant_matmul.configs import Config
from oxillama_torch.kernels.quant_matmul.fused import quant_matmul_gated, quant_matmul_segments
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import Call, use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 1e-2 if DEVICE == "cuda" else 2e-6
GEMM = Config(16, 32, 128, num_warps=4)
DP4A = Config(1, 8, 8, num_warps=1)


@pytest.fixture
def to_device():
    return lambda x: x.to(DEVICE) if x is not None else None


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("types", [("Q4_K", "Q6_K"), ("Q8_0", "Q4_0"), ("Q3_K", "IQ4_XS")])
@pytest.mark.parametrize("m", [1, 16, 17])
def test_two_weights_of_different_types_and_sizes(types, m, pack, activations, assert_close):
    """Neither size is a multiple of the tile; one has a bias."""
    (first, a), (second, b) = pack(types[0], 70, 512), pack(types[1], 33, 512)
    x, bias = activations(m, 512), torch.randn(33)
    weights = [first.to(DEVICE), second.to(DEVICE)]
    ys = triton_segments.launch_gemm(x.to(DEVICE), weights, [None, bias.to(DEVICE)], GEMM)
    assert_close(ys[0], x, a, rounding=ROUNDING)
    assert_close(ys[1], x, b, bias, rounding=ROUNDING)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("types", [("Q4_K", "Q6_K"), ("Q8_0", "Q5_1")])
@pytest.mark.parametrize("m", [1, 3])
def test_two_weights_in_integers(types, m, pack, activations, assert_close):
    (first, a), (second, b) = pack(types[0], 20, 512), pack(types[1], 13, 512)
    x, bias = activations(m, 512), torch.randn(20)
    weights, configs = [first.to(DEVICE), second.to(DEVICE)], [DP4A, Config(1, 4, 8, 1)]
    ys = triton_segments.launch_dp4a(x.to(DEVICE), weights, [bias.to(DEVICE), None], configs)
    assert_close(ys[0], x, a, bias, rounding=2e-2)
    assert_close(ys[1], x, b, rounding=2e-2)


def _gated_truth(x, values, kind):
    gate, up = (x.double() @ values.T).chunk(2, dim=1)
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }[kind]
    return act(gate) * up


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("type_name", "k"), [("Q4_K", 512), ("F16", 100)])
@pytest.mark.parametrize("m", [1, 17])
def test_gated_pair(kind, type_name, k, m, pack, activations):
    weight, values = pack(type_name, 2 * 37, k)
    x = activations(m, k)
    y = triton_gated_matmul.launch_gemm(x.to(DEVICE), weight.to(DEVICE), kind, GEMM).cpu()
    wanted = _gated_truth(x, values, kind)
    assert (y.double() - wanted).norm() / wanted.norm() < max(1e-5, ROUNDING)


@pytest.mark.interpret
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize("features", [8, 13])
def test_gated_pair_in_integers(type_name, features, pack, activations):
    weight, values = pack(type_name, 2 * features, 512)
    x = activations(3, 512)
    y = triton_gated_matmul.launch_dp4a(x.to(DEVICE), weight.to(DEVICE), "silu", DP4A).cpu()
    wanted = _gated_truth(x, values, "silu")
    assert (y.double() - wanted).norm() / wanted.norm() < 4e-2


@pytest.mark.interpret
@pytest.mark.usefixtures("ordered_dots")
@pytest.mark.parametrize("rules", ["", "triton.invariant"])
def test_invariant_bits_are_those_of_single_products(rules, pack, activations):
    """As they must be: a step with adapters computes the products one by one."""
    (first, _), (second, _) = pack("Q4_K", 70, 512), pack("Q6_K", 33, 512)
    both, x = pack("Q4_K", 74, 512)[0].to(DEVICE), activations(5, 512).to(DEVICE)
    weights = [first.to(DEVICE), second.to(DEVICE)]
    fused = ("quant_matmul_segments", "quant_matmul_gated")
    spec = ",".join(f"{op}={rules}" for op in fused) if rules else ""
    with use_kernels(spec):
        ys = quant_matmul_segments(x, weights, [None, None])
        y = quant_matmul_gated(x, both, "silu")
    alone = f"quant_matmul={rules},gated=triton" if rules else ""
    with use_kernels(alone):
        for got, weight in zip(ys, weights, strict=True):
            assert torch.equal(got, quant_matmul(x, weight))
        assert torch.equal(y, gated(*quant_matmul(x, both).chunk(2, dim=1), "silu"))


def test_tiles_that_a_table_has_for_one_type_alone_are_used(pack, activations, monkeypatch):
    configs = {"Q4_K": GEMM, "Q6_K": Config(16, 64, 64, num_warps=4)}
    used = []
    monkeypatch.setattr(triton_segments, "invariant_config", lambda w: configs[w.type_name])
    monkeypatch.setattr(triton_gemm, "launch", lambda x, w, b, c: used.append((w.type_name, c)))
    weights = [pack("Q4_K", 16, 256)[0], pack("Q6_K", 16, 256)[0]]
    triton_segments.segments_invariant(activations(2, 256), weights, [None, None])
    assert used == list(configs.items())


def test_a_rule_for_the_single_products_holds_for_fused_ones():
    call = Call("cuda", torch.bfloat16, "fast", "Q4_K+Q6_K", 1)
    kernels = {k.backend: k for k, _ in registry.candidates("quant_matmul_segments", call)}
    assert kernels["triton.dp4a"].unless_asked(call) is None
    with use_kernels("quant_matmul=triton.gemm"):
        assert "quant_matmul" in kernels["triton.dp4a"].unless_asked(call)
        assert registry.select("quant_matmul_segments", call).backend == "separate"
        gated_call = Call("cuda", torch.bfloat16, "fast", "Q4_K", 1)
        assert registry.select("quant_matmul_gated", gated_call).backend == "separate"


@pytest.mark.parametrize(
    ("types", "backend", "reason"),
    [
        ("Q4_K", "triton.gemm", "two weights, not 1"),
        ("Q4_K+F16", "triton.gemm", "block-quantized"),
        ("Q4_K+IQ1_S", "triton.dp4a", "integer form of IQ1_S"),
    ],
)
def test_what_fused_kernels_refuse(types, backend, reason):
    call = Call(DEVICE, torch.float32, "fast", types, 1)
    found = registry.candidates("quant_matmul_segments", call)
    refusals = {kernel.backend: why for kernel, why in found}
    assert reason in refusals[backend]
    assert refusals["separate"] is None


def test_bad_operands_are_named(pack):
    weight, odd = pack("Q8_0", 16, 64)[0], pack("Q8_0", 15, 64)[0]
    x = torch.randn(2, 64)
    for call, message in [
        (lambda: quant_matmul_segments(x, [weight], []), "biases: got 0"),
        (lambda: quant_matmul_segments(x[:, :32], [weight], [None]), r"wanted \(M, 64\)"),
        (lambda: quant_matmul_segments(x, [weight], [torch.zeros(3)]), r"bias: got shape \(3,\)"),
        (lambda: quant_matmul_gated(x, weight, "relu"), "wanted one of silu"),
        (lambda: quant_matmul_gated(x, odd, "silu"), "got 15 rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_no_rows(pack):
    weight = pack("Q8_0", 16, 64)[0]
    x = torch.empty(0, 64)
    assert [y.shape for y in quant_matmul_segments(x, [weight], [None])] == [(0, 16)]
    assert quant_matmul_gated(x, weight, "silu").shape == (0, 8)
