"""The product with a residual added before the one rounding.

Oracle: gguf-py's dequantize and float64 sums; for bits, the float32 product and one rounding.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.quant_matmul import triton_dp4a, triton_gemm, triton_gemv
from oxillama_torch.kernels.quant_matmul.configs import Config
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEMM, GEMV = Config(16, 32, 128, num_warps=4), Config(1, 8, 256, num_warps=2)
DP4A = Config(1, 8, 8, num_warps=1)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 2e-6}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
RULE = "quant_matmul_residual=triton.invariant"
pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]


@pytest.fixture
def operands(pack, activations):
    """``(type, M, N, K, dtype)`` -> x, weight, values float64, bias, residual."""

    def make(type_name, m, n, k, dtype=torch.float32):
        weight, values = pack(type_name, n, k)
        x, residual = activations(m, k, dtype), (5 * torch.randn(m, n)).to(dtype)
        return x, weight.to(DEVICE), values, torch.randn(n), residual

    return make


def assert_sum(assert_close, y, x, values, bias, residual, rounding):
    """``y`` is x @ values^T + bias + residual: the residual is a further weight, of input 1."""
    rows = torch.eye(len(x), dtype=torch.float64)
    wide_x = torch.cat([x.double(), rows], dim=1)
    for row, got in enumerate(y):
        wide = torch.cat([values, residual[row].double()[:, None].expand(-1, len(x))], dim=1)
        assert_close(got[None], wide_x[row : row + 1], wide, bias, rounding)


@DTYPES
@pytest.mark.parametrize("type_name", ["Q4_K", "Q8_0", "IQ4_XS"])
@pytest.mark.parametrize("m, n", [(1, 1), (1, 32), (15, 31), (16, 32), (17, 33), (3, 70)])
def test_gemm(type_name, m, n, dtype, operands, assert_close):
    x, weight, values, bias, residual = operands(type_name, m, n, 256, dtype)
    on = (x.to(DEVICE), weight, bias.to(DEVICE), GEMM, residual.to(DEVICE))
    y = triton_gemm.launch(*on)
    assert y.dtype == dtype
    assert_sum(assert_close, y.cpu(), x, values, bias, residual, ROUNDING[dtype])


@DTYPES
@pytest.mark.parametrize("m, n", [(1, 1), (1, 7), (1, 8), (2, 9), (2, 31)])
def test_gemv(m, n, dtype, operands, assert_close):
    x, weight, values, bias, residual = operands("Q4_K", m, n, 512, dtype)
    on = (x.to(DEVICE), weight, bias.to(DEVICE), GEMV, residual.to(DEVICE))
    y = triton_gemv.launch(*on).cpu()
    assert_sum(assert_close, y, x, values, bias, residual, 2e-6)


@pytest.mark.parametrize("m, n", [(1, 1), (1, 7), (2, 8), (3, 9)])
def test_integers(m, n, operands):
    """The same sums as without the residual, and it added to them."""
    x, weight, _, bias, residual = operands("Q4_K", m, n, 512)
    on = (x.to(DEVICE), weight, bias.to(DEVICE), DP4A)
    y = triton_dp4a.launch(*on, residual=residual.to(DEVICE))
    assert torch.equal(y, triton_dp4a.launch(*on) + residual.to(DEVICE))


def test_the_residual_may_be_a_view_and_is_left_alone(operands, assert_close):
    x, weight, values, bias, _ = operands("Q8_0", 5, 12, 64)
    table = torch.full((5, 40), torch.nan)
    table[:, 7:19] = torch.randn(5, 12)
    residual = table.to(DEVICE)[:, 7:19]
    with use_kernels(RULE):
        y = quant_matmul(x.to(DEVICE), weight, bias.to(DEVICE), residual=residual)
    assert_sum(assert_close, y.cpu(), x, values, bias, table[:, 7:19], 2e-6)
    assert torch.equal(residual.cpu(), table[:, 7:19])


@pytest.mark.usefixtures("ordered_dots")
@DTYPES
def test_invariant_bits_do_not_depend_on_the_batch(dtype, operands):
    x, weight, _, bias, residual = operands("Q4_K", 40, 70, 768, dtype)
    x, bias, residual = x.to(DEVICE), bias.to(DEVICE), residual.to(DEVICE)
    with use_kernels(f"{RULE},quant_matmul=triton.invariant"):
        whole = quant_matmul(x, weight, bias, residual=residual)
        for start, stop in [(0, 1), (1, 3), (5, 12), (15, 33), (39, 40)]:
            part = quant_matmul(x[start:stop], weight, bias, residual=residual[start:stop])
            assert torch.equal(part, whole[start:stop]), (start, stop)
        if dtype == torch.float32:
            assert torch.equal(whole, quant_matmul(x, weight, bias) + residual)


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
@pytest.mark.parametrize("rule", ["", "quant_matmul_residual=separate", "quant_matmul=reference"])
def test_what_serves_by_itself(rule, numerics, operands):
    x, weight, values, bias, residual = operands("Q6_K", 6, 33, 256, torch.bfloat16)
    on = (x.to(DEVICE), weight, bias.to(DEVICE))
    with use_kernels(rule):
        y = quant_matmul(*on, residual=residual.to(DEVICE), numerics=numerics).cpu().double()
    truth = x.double() @ values.T + bias.double() + residual.double()
    assert (y - truth).norm() < 1e-2 * truth.norm()
    with use_kernels("quant_matmul_residual=reference"):
        once = quant_matmul(*on, residual=residual.to(DEVICE)).cpu().double()
    assert ((once - truth).abs() <= truth.abs() * 2**-8 + 1e-4).all()


def test_no_rows(operands):
    x, weight, _, bias, residual = operands("Q8_0", 1, 8, 32)
    none = quant_matmul(x[:0].to(DEVICE), weight, bias.to(DEVICE), residual=residual[:0].to(DEVICE))
    assert none.shape == (0, 8)


def test_a_residual_that_does_not_fit(operands):
    x, weight, _, _, residual = operands("Q8_0", 2, 8, 32)
    x = x.to(DEVICE)
    with pytest.raises(ValueError, match=r"residual: got shape \(2, 7\), wanted \(2, 8\)"):
        quant_matmul(x, weight, residual=residual[:, :7].to(DEVICE))
    with pytest.raises(ValueError, match="residual: got torch.int64 on .*, wanted a floating"):
        quant_matmul(x, weight, residual=residual.long().to(DEVICE))
