"""kernels/activation. Oracle: torch.nn.functional's activations in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oxillama_torch.kernels.activation.op import KINDS, gated
from oxillama_torch.kernels.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORACLE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
# Rounding to the output's dtype; the interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(backend: str, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    with use_kernels(f"gated={backend}"):
        return gated(gate.to(DEVICE), up.to(DEVICE), kind).cpu()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_torch(backend, kind, dtype):
    gate, up = (torch.randn(3, 1100) * 4).to(dtype), torch.randn(3, 1100).to(dtype)
    want = ORACLE[kind](gate.double()) * up.double()
    got = run(backend, gate, up, kind)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_far_out_inputs(backend, kind):
    gate = torch.tensor([[-1e4, -200.0, -0.0, 0.0, 200.0, 1e4]])
    got = run(backend, gate, torch.ones_like(gate), kind)
    assert torch.equal(got, torch.tensor([[0.0, 0.0, 0.0, 0.0, 200.0, 1e4]]))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_halves_of_one_tensor(backend):
    both = torch.randn(4, 66)
    gate, up = both.chunk(2, dim=1)
    want = run(backend, gate.contiguous(), up.contiguous(), "silu")
    assert torch.equal(run(backend, gate, up, "silu"), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("features", [1, 5, 33, 1000, 2731])
def test_reference_rows_do_not_depend_on_the_batch(kind, threads, features):
    """torch's own silu and gelu fail this: their tails round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gate, up = torch.randn(41, features) * 3, torch.randn(41, features)
        whole = run("reference", gate, up, kind)
        for m in (1, 2, 16):
            for start in (0, 1, 24):
                part = slice(start, start + m)
                got = run("reference", gate[part].clone(), up[part].clone(), kind)
                assert torch.equal(got, whole[part])
    finally:
        torch.set_num_threads(before)


def test_no_rows():
    assert gated(torch.empty(0, 8), torch.empty(0, 8), "silu").shape == (0, 8)


@pytest.mark.parametrize(
    ("gate", "up", "kind", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 4), "relu", "kind: got 'relu', wanted one of silu"),
        (torch.ones(4), torch.ones(4), "silu", r"gate: got \(4,\), wanted \(M, F\)"),
        (torch.ones(2, 4), torch.ones(2, 5), "silu", r"up: got .*\(2, 5\).*wanted .*\(2, 4\)"),
        (torch.ones(2, 4), torch.ones(2, 4).half(), "silu", "up: got torch.float16"),
        (torch.ones(2, 4).int(), torch.ones(2, 4).int(), "silu", "gate: got torch.int32"),
        (torch.ones(2, 4), torch.ones(2, 4, device="meta"), "silu", "up: got .* on meta"),
        (torch.ones(4, 2).T, torch.ones(4, 2).T, "silu", r"gate: got strides \(1, 2\)"),
    ],
)
def test_bad_operands_are_named(gate, up, kind, message):
    with pytest.raises(ValueError, match=message):
        gated(gate, up, kind)
