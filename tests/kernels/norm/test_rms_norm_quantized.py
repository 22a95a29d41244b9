"""RMSNorm whose rows come in 8 bits too, and the products that take them.

Oracle: the same in two kernels, ``rms_norm`` and ``quantize``, which have tests of their own.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from oxillama_torch.kernels.norm.op import rms_norm, rms_norm_quantized  # noqa: E402
from oxillama_torch.kernels.quant_matmul import triton_quantize  # noqa: E402
from oxillama_torch.kernels.quant_matmul.fused import (  # noqa: E402
    quant_matmul_gated,
    quant_matmul_segments,
    wants_quantized,
)
from oxillama_torch.kernels.quant_matmul.op import quant_matmul  # noqa: E402
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows  # noqa: E402
from oxillama_torch.kernels.registry import use_kernels  # noqa: E402
from oxillama_torch.layers.linear import LinearGroup, QuantLinear  # noqa: E402
from oxillama_torch.layers.norm import RMSNorm  # noqa: E402
from oxillama_torch.models.decoder import _normed  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = "rms_norm=triton,rms_norm_quantized=triton,quant_matmul=triton.dp4a"
FUSED = "quant_matmul_gated=triton.dp4a,quant_matmul_segments=triton.dp4a"
pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]


def quantized_rows(x: torch.Tensor) -> QuantizedRows:
    return QuantizedRows(x, *triton_quantize.quantize(x))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("d", [32, 96, 4096])
def test_equals_norm_and_quantize(backend, with_residual, d):
    x, weight = torch.randn(3, d, device=DEVICE), torch.rand(d, device=DEVICE)
    x[1, :32] = 0
    residual = torch.randn_like(x) if with_residual else None
    with use_kernels(f"rms_norm={backend},rms_norm_quantized={backend}"):
        rows, summed = rms_norm_quantized(x, weight, 1e-5, residual=residual)
        normed = rms_norm(x, weight, 1e-5, residual=residual)
    normed, wanted_sum = normed if with_residual else (normed, x)
    assert torch.equal(rows.x, normed) and torch.equal(summed, wanted_sum)
    values, scales, sums = triton_quantize.quantize(normed)
    # x / d and x * (1 / d) fall on two sides of a half now and then.
    most = 0 if backend == "triton" else 1
    assert (rows.values.int() - values.int()).abs().max() <= most
    torch.testing.assert_close(rows.scales, scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.sums, sums, rtol=1e-5, atol=float(most * scales.max()))


def test_rows_that_no_group_fits_are_refused():
    with pytest.raises(ValueError, match="40 features, wanted a multiple of 32"):
        rms_norm_quantized(torch.randn(2, 40), torch.ones(40), 1e-5)


def test_products_give_the_same_bits_and_quantize_nothing(pack, activations, monkeypatch):
    both, q6 = pack("Q4_K", 32, 256)[0].to(DEVICE), pack("Q6_K", 8, 256)[0].to(DEVICE)
    x = activations(2, 256).to(DEVICE)
    rows = quantized_rows(x)

    def products(x) -> list[torch.Tensor]:
        with use_kernels(TRITON):
            single = quant_matmul(x, both, numerics="fast")
        with use_kernels(FUSED):
            several = quant_matmul_segments(x, [both, q6], [None, None], numerics="fast")
            return [single, *several, quant_matmul_gated(x, both, "silu", numerics="fast")]

    wanted = products(x)
    monkeypatch.setattr(triton_quantize, "quantize", None)
    for got, want in zip(products(rows), wanted, strict=True):
        assert torch.equal(got, want)


def test_other_backends_get_the_rows_themselves(pack, activations):
    weight, x = pack("Q4_K", 8, 256)[0].to(DEVICE), activations(2, 256).to(DEVICE)
    with use_kernels("quant_matmul=reference"):
        assert torch.equal(quant_matmul(quantized_rows(x), weight), quant_matmul(x, weight))


def test_a_norm_quantizes_for_products_that_would(pack, activations):
    weight, x = pack("Q4_K", 8, 256)[0].to(DEVICE), activations(5, 256).to(DEVICE)
    group = LinearGroup([QuantLinear(weight, numerics="fast")])
    norm = RMSNorm(torch.ones(256, device=DEVICE), 1e-5, numerics="fast")
    with use_kernels(TRITON):
        rows, summed = _normed(norm, x[:2], x[2:4], group, None)
        assert isinstance(rows, QuantizedRows) and torch.equal(summed, x[:2] + x[2:4])
        assert torch.equal(group(rows)[0], group(rows.x)[0])
    with use_kernels("quant_matmul=reference"):
        assert isinstance(_normed(norm, x[:2], None, group, None)[0], torch.Tensor)
    assert not wants_quantized(x[:2], [weight], "invariant")
