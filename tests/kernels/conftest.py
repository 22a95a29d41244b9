"""Packed weights with known values, and what a product with them may be off by."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch

from oxillama_torch.kernels.formats import PackedTensor

# Types that gguf-py decodes but cannot encode: offsets of the float16 scales in their blocks.
_SCALES_AT = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def _pack(type_name: str, rows: int, columns: int) -> tuple[PackedTensor, torch.Tensor]:
    rng = np.random.default_rng(rows * 1009 + columns)
    qtype = gguf.GGMLQuantizationType[type_name]
    block_weights, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    if type_name in _SCALES_AT:
        data = rng.integers(0, 256, (rows * columns // block_weights, block_bytes), dtype=np.uint8)
        for at in _SCALES_AT[type_name]:
            scale = rng.uniform(0.001, 0.01, (len(data), 1)).astype(np.float16)
            data[:, at : at + 2] = scale.view(np.uint8)
    else:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        data = gguf.quants.quantize(values, qtype)
    data = np.ascontiguousarray(data).view(np.uint8).reshape(rows, -1)
    truth = gguf.quants.dequantize(data, qtype).astype(np.float64)
    packed = PackedTensor.from_bytes(type_name, torch.from_numpy(data).flatten(), truth.shape)
    return packed, torch.from_numpy(truth)


def _activations(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns) * torch.linspace(0.2, 2, columns)).to(dtype)


def _assert_close(
    got: torch.Tensor,
    x: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None = None,
    rounding: float = 2e-6,
) -> None:
    got, x, values = got.cpu(), x.cpu().double(), values.cpu()
    offset = 0 if bias is None else bias.cpu().double()
    truth = x @ values.T + offset
    magnitude = x.abs() @ values.abs().T
    bound = magnitude * rounding + truth.abs() * torch.finfo(got.dtype).eps
    error = (got.double() - truth).abs()
    assert (error <= bound).all(), f"largest error {(error / bound).max():.3g} of the bound"


@pytest.fixture
def pack() -> Callable[..., tuple[PackedTensor, torch.Tensor]]:
    """``(type, N, K)`` -> a packed weight and its values by gguf-py, float64 [N, K]."""
    return _pack


@pytest.fixture
def activations() -> Callable[..., torch.Tensor]:
    """``(M, K, dtype)`` -> random x whose columns differ in size, so that a permuted K shows."""
    return _activations


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """``(y, x, values, bias, rounding)``: y is x @ values^T + bias, but for the rounding of y.

    ``rounding`` is the relative error each product of a sum may have: float32 accumulation.
    """
    return _assert_close
