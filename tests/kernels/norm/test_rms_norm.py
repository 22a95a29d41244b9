"""kernels/norm. Oracle: torch.nn.functional.rms_norm in float64."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.norm.op import rms_norm
from oxillama_torch.kernels.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rounding to the output's dtype; the interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
EPS = 1e-2  # large, so that a kernel that adds it in the wrong place is seen
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(backend: str, x: torch.Tensor, weight: torch.Tensor, residual=None, eps: float = EPS):
    residual = None if residual is None else residual.to(DEVICE)
    with use_kernels(f"rms_norm={backend}"):
        out = rms_norm(x.to(DEVICE), weight.to(DEVICE), eps, residual=residual)
    return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()


def rows(m: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, so that a mean over the wrong elements shows."""
    return (torch.randn(m, d) * torch.logspace(-2, 2, m)[:, None]).to(dtype)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [1, 63, 64, 65, 320, 4096])
def test_equals_torch(backend, dtype, d):
    x, weight = rows(5, d, dtype), torch.randn(d)
    want = torch.nn.functional.rms_norm(x.double(), (d,), weight.double(), EPS)
    got = run(backend, x, weight)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_residual_is_summed_in_the_activations_dtype(backend, dtype):
    x, residual, weight = rows(7, 96, dtype), rows(7, 96, dtype).flip(0), torch.randn(96)
    normed, summed = run(backend, x, weight, residual)
    assert torch.equal(summed, x + residual)
    want = torch.nn.functional.rms_norm((x + residual).double(), (96,), weight.double(), EPS)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(normed.double(), want, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("d", [7, 64, 1000, 2048, 16384])
def test_reference_rows_do_not_depend_on_the_batch(threads, d):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = rows(40, d), torch.randn(d)
        whole = run("reference", x, weight)
        for m in (1, 3, 16):
            for start in (0, 1, 23):
                part = run("reference", x[start : start + m].clone(), weight)
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
    assert rms_norm(empty, torch.ones(8), EPS).shape == (0, 8)
    normed, summed = rms_norm(empty, torch.ones(8), EPS, residual=empty)
    assert normed.shape == summed.shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "weight", "residual", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(4), None, r"x: got \(2, 3, 4\)"),
        (torch.ones(4, 2).T, torch.ones(4), None, "x: got .*wanted contiguous"),
        (torch.ones(2, 4).int(), torch.ones(4), None, "x: got torch.int32"),
        (torch.ones(1, 16385), torch.ones(16385), None, "x: got 16385 features, wanted at most"),
        (torch.ones(2, 4), torch.ones(3), None, r"weight: got torch.float32 \(3,\)"),
        (torch.ones(2, 4), torch.ones(4).half(), None, "weight: got torch.float16"),
        (torch.ones(2, 4), torch.ones(4, device="meta"), None, "weight: got .* on meta"),
        (torch.ones(2, 4), torch.ones(4), torch.ones(1, 4), r"residual: got torch.float32 \(1, 4"),
        (torch.ones(2, 4), torch.ones(4), torch.ones(2, 4).half(), "residual: got torch.float16"),
    ],
)
def test_bad_operands_are_named(x, weight, residual, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, EPS, residual=residual)
