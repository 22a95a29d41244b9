"""Packed weights with known values, and what a product with them may be off by."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch

from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.gguf.writer import ENCODABLE
from oxillama_torch.kernels.formats import PackedTensor
from tests.support.blocks import oracle, tame_blocks


def _pack(type_name: str, rows: int, columns: int) -> tuple[PackedTensor, torch.Tensor]:
    seed = rows * 1009 + columns
    if type_name in ENCODABLE:
        values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name])
        blocks = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8))
        blocks = blocks.view(rows, -1, TYPE_SIZES[GGMLType[type_name]].block_bytes)
    else:
        blocks = tame_blocks(type_name, rows, columns, seed)
    packed = PackedTensor.from_bytes(type_name, blocks.flatten(), (rows, columns))
    return packed, oracle(type_name, blocks).double()


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


@pytest.fixture
def ordered_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted ``tl.dot`` adds over K in one order whatever the tile's width, as a GPU does.

    The interpreter calls numpy, whose BLAS sums tiles of different widths differently on some CPUs.
    """
    if torch.cuda.is_available():
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")

    def create_dot(_builder, a, b, d, *_precision):
        total = np.zeros(d.data.shape, d.data.dtype)
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None] * b.data[k]
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
