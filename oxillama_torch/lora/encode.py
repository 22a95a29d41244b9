"""Merged weights as the bytes of a GGML type, and what rounding to it costs.

N outputs, K inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.gguf.writer import ENCODABLE
from oxillama_torch.kernels.formats.base import get

__all__ = ["MERGE_DTYPES", "Rounding", "TensorReport", "decode", "encode", "merged_type"]

#: What merged tensors are kept as; ``same``: the type they had where it can be encoded, else F16.
MERGE_DTYPES = ("f16", "bf16", "f32", "q8_0", "same")

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One merged tensor.

    Args:
        name: in the file, such as ``blk.0.attn_q``.
        type_before, type_after: GGML types.
        weight_error: root mean square error of the encoded weights over that of the weights.
        change_error: the same error over the change that the adapters make.
    """

    name: str
    type_before: str
    type_after: str
    weight_error: float
    change_error: float


class Rounding:
    """Squares of errors, summed in float64."""

    def __init__(self) -> None:
        self.error = self.weight = self.change = 0.0

    def add(self, old: Tensor, exact: Tensor, encoded: Tensor) -> None:
        """Count some rows: as they were, as they should be, and as they are kept."""
        self.error += float((encoded - exact).double().square().sum())
        self.weight += float(exact.double().square().sum())
        self.change += float((exact - old).double().square().sum())

    def include(self, other: Rounding) -> None:
        """Count what another one has counted."""
        self.error += other.error
        self.weight += other.weight
        self.change += other.change

    @property
    def weight_error(self) -> float:
        return math.sqrt(self.error / self.weight) if self.weight else 0.0

    @property
    def change_error(self) -> float:
        return math.sqrt(self.error / self.change) if self.change else 0.0


def merged_type(dtype: str, before: str, columns: int) -> str:
    """The GGML type in which a merged tensor is kept.

    Args:
        dtype: one of MERGE_DTYPES; ``same`` is the type it had where that can be encoded, else F16.
        before: the type it had.
        columns: weights in a row.

    Raises:
        UnsupportedError: the dtype is unknown.
    """
    if dtype not in MERGE_DTYPES:
        raise UnsupportedError(f"merge dtype {dtype!r}", MERGE_DTYPES)
    if dtype != "same":
        return dtype.upper()
    fits = columns % TYPE_SIZES[GGMLType[before]].block_weights == 0
    return before if before in ENCODABLE and fits else "F16"


def encode(type_name: str, values: Tensor, what: str = "a weight") -> Tensor:
    """Weights float32 [n, K] as the bytes of a GGML type, uint8 [bytes], on their device.

    Raises:
        UnsupportedError: the type cannot hold them, or takes gguf-py, which is not installed.
    """
    if type_name in _FLOATS:
        small = values.to(_FLOATS[type_name])
        if type_name == "F16" and not bool(torch.isfinite(small).all()):
            raise UnsupportedError(
                f"{what} merged as f16: it has values beyond 65504", ("bf16", "f32")
            )
        return small.contiguous().view(torch.uint8).flatten()
    block = TYPE_SIZES[GGMLType[type_name]].block_weights
    if values.shape[1] % block:
        name = type_name.lower()
        raise UnsupportedError(f"{what}: {name} rows of {values.shape[1]} weights", ("f16", "f32"))
    return _encode_q8_0(values) if type_name == "Q8_0" else _by_gguf(type_name, values)


def decode(type_name: str, data: Tensor, like: Tensor) -> Tensor:
    """The weights that bytes stand for, float32 in the shape of ``like``."""
    format = get(type_name)
    return format.dequantize(data.view(-1, format.block_bytes)).view_as(like)


def _encode_q8_0(values: Tensor) -> Tensor:
    """Blocks of 32 as gguf-py's ``quantize`` makes them: d = largest / 127, halves away from 0."""
    blocks = values.unflatten(1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * torch.where(d == 0, 0.0, 1 / d)
    magnitude = scaled.abs()
    floor = magnitude.floor()
    quants = scaled.sign() * (floor + (2 * (magnitude - floor)).floor())
    scales = d.half().view(torch.uint8)
    return torch.cat([scales, quants.to(torch.int8).view(torch.uint8)], dim=-1).flatten()


def _by_gguf(type_name: str, values: Tensor) -> Tensor:
    try:
        import gguf
    except ModuleNotFoundError:
        what = f"encoding {type_name} without the gguf package (pip install gguf)"
        raise UnsupportedError(what, ("f16", "bf16", "f32", "q8_0")) from None
    kind = gguf.GGMLQuantizationType[type_name]
    data = gguf.quants.quantize(values.cpu().numpy(), kind)
    return torch.from_numpy(data).flatten().to(values.device)
