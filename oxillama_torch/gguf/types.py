"""GGML tensor types: ids, names and block sizes.

Source: ``enum ggml_type`` and the block structs of ggml (ggml.h, ggml-common.h). A *block* is the
unit of quantization: ``block_weights`` consecutive weights of a row stored in ``block_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["TYPE_SIZES", "GGMLType", "TypeSize", "row_bytes"]


class GGMLType(IntEnum):
    """Ids as they stand in files. Removed ids (4, 5, 31-33, 36-38) are left out on purpose."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


@dataclass(frozen=True, slots=True)
class TypeSize:
    """Size of one block: ``block_weights`` weights in ``block_bytes`` bytes."""

    block_weights: int
    block_bytes: int


_SIZES = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "F64": (1, 8),
    "I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q8_0": (32, 34), "Q8_1": (32, 36),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "Q8_K": (256, 292),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66),
    "MXFP4": (32, 17), "NVFP4": (64, 36), "Q1_0": (128, 18), "Q2_0": (64, 18),
}  # fmt: skip

TYPE_SIZES: dict[GGMLType, TypeSize] = {GGMLType[n]: TypeSize(*s) for n, s in _SIZES.items()}


def row_bytes(type: GGMLType, weights: int) -> int:
    """Bytes of a row of ``weights`` weights; ``weights`` must be a multiple of the block."""
    size = TYPE_SIZES[type]
    assert weights % size.block_weights == 0, f"{weights} is no multiple of {size.block_weights}"
    return weights // size.block_weights * size.block_bytes
