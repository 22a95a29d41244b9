"""What kernels for CPUs keep of a model's weights beside the planes, and how much that is.

It is known before anything is loaded: each form is made of a few rows of zeros and measured, so
that a form whose layout changes is still counted right.

Shapes: N rows, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType, row_bytes
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul import compiled, cpu, factored, unpacked

__all__ = ["kept_bytes", "planned_bytes"]

#: Rows that are made to measure a form: a multiple of the rows that any form is padded to.
_ROWS = 64
_PADDED_TO = 16


def planned_bytes(
    weights: Iterable[tuple[GGMLType, int, int]],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    numerics: str,
) -> int:
    """Bytes that ``engine.loading.prepare_kernels`` will keep of a model's weights.

    Args:
        weights: (type, N, K) of every matrix that the model multiplies with.
        device, dtype, numerics: as those of the model.
    """
    if torch.device(device).type != "cpu":
        return 0
    weights = list(weights)
    large = sum(rows * inputs for _, rows, inputs in weights) >= compiled.MIN_WEIGHTS
    total = 0
    for type, rows, inputs in weights:
        call = registry.Call("cpu", dtype, numerics, type.name)
        if numerics == "fast" and factored.wanted(type.name, large):
            total += _form_bytes(_words, type, rows, inputs)
        elif registry.select("quant_matmul", call).backend == "cpu":
            total += _form_bytes(cpu.pack, type, rows, inputs)
        elif type.name in unpacked.TYPES and compiled.wanted(type.name, large):
            total += _form_bytes(_bytes, type, rows, inputs)
    return total


def kept_bytes(weights: Iterable[PackedTensor]) -> int:
    """Bytes that are kept of weights now."""
    return sum(
        tensor.nbytes
        for weight in weights
        for form in (cpu.kept(weight), unpacked.kept(weight), factored.kept(weight).values())
        for tensor in form
    )


def _words(weight: PackedTensor) -> Iterable[Tensor]:
    return factored.pack(weight).values()


def _bytes(weight: PackedTensor) -> Iterable[Tensor]:
    return unpacked.split(weight).values()


def _form_bytes(
    make: Callable[[PackedTensor], Iterable[Tensor]], type: GGMLType, rows: int, inputs: int
) -> int:
    padded = -(-rows // _PADDED_TO) * _PADDED_TO
    return padded * _sample_bytes(make, type, inputs) // _ROWS


@functools.cache
def _sample_bytes(
    make: Callable[[PackedTensor], Iterable[Tensor]], type: GGMLType, inputs: int
) -> int:
    data = torch.zeros(_ROWS * row_bytes(type, inputs), dtype=torch.uint8)
    return sum(form.nbytes for form in make(PackedTensor.from_bytes(type, data, (_ROWS, inputs))))
