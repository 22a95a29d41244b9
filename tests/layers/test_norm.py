"""RMSNorm with and without the residual. Oracle: the formula in float64."""

from __future__ import annotations

import torch

from oxillama_torch.layers.norm import RMSNorm


def expected(x, weight, eps):
    wide = x.double()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


def test_alone_the_input_becomes_the_residual():
    norm, x = RMSNorm(torch.rand(48), 1e-2), torch.randn(7, 48)
    y, residual = norm(x, None)
    assert residual is x
    torch.testing.assert_close(y, expected(x, norm.weight, 1e-2))


def test_residual_is_added_before_the_norm():
    norm, x, residual = RMSNorm(torch.rand(48), 1e-6), torch.randn(7, 48), torch.randn(7, 48)
    y, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, expected(x + residual, norm.weight, 1e-6))


def test_bfloat16_is_normed_in_float32():
    norm, x = RMSNorm(torch.rand(48), 1e-6), (100 * torch.randn(7, 48)).bfloat16()
    y, _ = norm(x, None)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected(x, norm.weight, 1e-6), rtol=2**-7, atol=0)
