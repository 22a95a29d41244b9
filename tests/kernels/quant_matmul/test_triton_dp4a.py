"""The integer matmul and its 8-bit activations, interpreted or on a GPU.

Oracle: the definition of the quantization; then gguf-py's dequantize and float64 products with the
quantized activations, which the integer arithmetic must reproduce to float32 rounding.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.quant_matmul.configs import Config
from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.quant_matmul.triton_dp4a import launch
from oxillama_torch.kernels.quant_matmul.triton_quantize import quantize
from oxillama_torch.kernels.registry import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = Config(1, 16, 8, num_warps=1)
TYPES = [name.lower() for name in UNITS]
pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [32, 96, 1088])
def test_quantize(dtype, k, activations):
    x = activations(3, k, dtype)
    x[1, :32] = 0
    x[2, 0] = -100  # the largest of its group, negative
    values, scales, sums = (t.cpu() for t in quantize(x.to(DEVICE)))
    groups, q = x.float().unflatten(1, (-1, 32)), values.float().unflatten(1, (-1, 32))
    torch.testing.assert_close(scales, groups.abs().amax(2) / 127, rtol=1e-6, atol=0)
    error = (q * scales[..., None] - groups).abs()
    assert (error <= scales[..., None] * 0.5001).all()
    torch.testing.assert_close(sums, q.sum(2) * scales, rtol=1e-6, atol=0)
    assert values[2, 0] == -127 and not values[1, :32].any()


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("m, n, k", [(1, 16, 256), (1, 15, 512), (2, 17, 768)])
def test_equals_the_product_with_quantized_activations(
    type_name, m, n, k, pack, activations, assert_close
):
    weight, values = pack(type_name.upper(), n, k)
    x = activations(m, k).to(DEVICE)
    bias = torch.randn(n)
    q, scales, _ = (t.cpu().double() for t in quantize(x))
    rounded = (q.unflatten(1, (-1, 32)) * scales[..., None]).flatten(1)
    y = launch(x, weight.to(DEVICE), bias.to(DEVICE), CONFIG)
    assert_close(y, rounded, values, bias)


@pytest.mark.parametrize("type_name", TYPES)
def test_error_of_8_bit_activations_is_within_half_a_step(type_name, pack, activations):
    weight, values = pack(type_name.upper(), 24, 512)
    x = activations(4, 512, torch.bfloat16)
    with use_kernels("quant_matmul=triton.dp4a"):
        y = quant_matmul(x.to(DEVICE), weight.to(DEVICE), numerics="fast").cpu().double()
    truth = x.double() @ values.T
    step = x.double().unflatten(1, (-1, 32)).abs().amax(2).repeat_interleave(32, 1) / 127
    bound = 0.5001 * step @ values.abs().T + truth.abs() * 2**-7
    assert ((y - truth).abs() <= bound).all()
    assert ((y - truth).norm() / truth.norm()) < 0.02


def test_rows_of_few_groups(pack, activations, assert_close):
    weight, values = pack("Q8_0", 12, 96)
    x = activations(2, 96).to(DEVICE)
    q, scales, _ = (t.cpu().double() for t in quantize(x))
    rounded = (q.unflatten(1, (-1, 32)) * scales[..., None]).flatten(1)
    assert_close(launch(x, weight.to(DEVICE), None, CONFIG), rounded, values)
