"""kernels/norm. Oracle: torch.nn.functional.layer_norm in float64."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.norm.op import layer_norm
from oxillama_torch.kernels.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rounding to the output's dtype; the interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EPS = 1e-2  # large, so that a kernel that adds it in the wrong place is seen
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(backend: str, x, weight, bias=None, residual=None, eps: float = EPS):
    there = [None if t is None else t.to(DEVICE) for t in (x, weight, bias, residual)]
    with use_kernels(f"layer_norm={backend}"):
        out = layer_norm(*there[:3], eps, residual=there[3])
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def rows(m: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes with means far from zero: sums of squares would cancel."""
    noise = torch.randn(m, d) + torch.linspace(-30, 30, m)[:, None]
    return (noise * torch.logspace(-2, 2, m)[:, None]).to(dtype)


def truth(x, weight, bias=None):
    bias = None if bias is None else bias.double()
    return torch.nn.functional.layer_norm(x.double(), x.shape[1:], weight.double(), bias, EPS)


def assert_near(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor) -> None:
    assert got.dtype == x.dtype
    tolerance = TOLERANCE[x.dtype]
    # float32 holds a row's values to 2^-24 of their size, thirty times that of their differences
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=max(tolerance / 8, 2e-5))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 63, 64, 65, 320, 4096])
def test_equals_torch(backend, dtype, d):
    x, weight, bias = rows(5, d, dtype), torch.randn(d), torch.randn(d)
    assert_near(run(backend, x, weight, bias), truth(x, weight, bias), x)
    assert_near(run(backend, x, weight), truth(x, weight), x)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_residual_is_summed_in_the_activations_dtype(backend, dtype):
    x, residual, weight = rows(7, 96, dtype), rows(7, 96, dtype).flip(0), torch.randn(96)
    normed, summed = run(backend, x, weight, residual=residual)
    assert torch.equal(summed, x + residual)
    assert_near(normed, truth(x + residual, weight), x)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("d", [7, 64, 1000, 2048, 16384])
def test_reference_rows_do_not_depend_on_the_batch(threads, d):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias = rows(40, d), torch.randn(d), torch.randn(d)
        whole = run("reference", x, weight, bias)
        for m in (1, 3, 16):
            for start in (0, 1, 23):
                part = run("reference", x[start : start + m].clone(), weight, bias)
                assert torch.equal(part, whole[start : start + m])
    finally:
        torch.set_num_threads(before)


def test_triton_rows_do_not_depend_on_the_batch():
    x, weight = rows(9, 200), torch.randn(200)
    whole = run("triton", x, weight)
    assert torch.equal(run("triton", x[4:5].clone(), weight), whole[4:5])
    assert torch.equal(run("triton", x.flip(0).contiguous(), weight), whole.flip(0))


def test_no_rows():
    empty = torch.empty(0, 8)
    assert layer_norm(empty, torch.ones(8), None, EPS).shape == (0, 8)
    normed, summed = layer_norm(empty, torch.ones(8), None, EPS, residual=empty)
    assert normed.shape == summed.shape == (0, 8)


ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "residual", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(4), None, None, r"x: got \(2, 3, 4\)"),
        (torch.ones(4, 2).T, torch.ones(4), None, None, "x: got .*wanted contiguous"),
        (ONES.int(), torch.ones(4), None, None, "x: got torch.int32"),
        (ONES, torch.ones(3), None, None, r"weight: got torch.float32 \(3,\)"),
        (ONES, torch.ones(4), torch.ones(4).half(), None, "bias: got torch.float16"),
        (ONES, torch.ones(4), torch.ones(4, device="meta"), None, "bias: got .* on meta"),
        (ONES, torch.ones(4), None, ONES[:1], r"residual: got torch.float32 \(1, 4"),
    ],
)
def test_bad_operands_are_named(x, weight, bias, residual, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(x, weight, bias, EPS, residual=residual)
