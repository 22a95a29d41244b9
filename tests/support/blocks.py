"""Random GGUF blocks of every type, and gguf-py's opinion of what they mean.

Shapes: N rows, B blocks per row, K weights per row.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch

from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType

# Byte offsets of the float16 fields of each block, from ggml-common.h.
SCALES = {
    "F32": [], "F16": [], "BF16": [],
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q8_1": [0, 2], "Q8_K": [],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
    "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [], "NVFP4": [],
    "IQ1_S": [0], "IQ1_M": [], "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0],
    "IQ3_XXS": [0], "IQ3_S": [0], "TQ1_0": [52], "TQ2_0": [64], "Q1_0": [0], "Q2_0": [0],
}  # fmt: skip
TYPES = sorted(SCALES)


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """uint8 [N, B, block_bytes]: any bytes at all, but with finite scales (some subnormal)."""
    size = TYPE_SIZES[GGMLType[name]]
    shape = (rows, columns // size.block_weights, size.block_bytes)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    for offset in SCALES[name]:
        blocks[..., offset + 1] &= 0xBF  # the top bit of the exponent: below 2, never inf or NaN
    if name == "Q8_K":
        blocks[..., 3] &= 0xBF  # the same for the float32
    if name == "IQ1_M":
        blocks[..., 55] &= 0xBF  # the top nibbles of four 16-bit words hold the float16
    if name == "MXFP4":
        blocks[..., 0] %= 200  # below 2^72, so that 12 times as much is finite
    return torch.from_numpy(blocks)


def tame_blocks(name: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """The same with scales of the size they have in models: sums of products fit in float16."""
    blocks = random_blocks(name, rows, columns, seed).numpy()
    random = np.random.default_rng(seed)
    for offset in SCALES[name]:
        scale = random.uniform(0.001, 0.01, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., offset : offset + 2] = scale.view(np.uint8)
    if name == "NVFP4":
        blocks[..., :4] &= 0x1F
    if name == "MXFP4":
        blocks[..., 0] = 116 + blocks[..., 0] % 8  # 2^-12 to 2^-5
    if name == "Q8_K":
        scale = random.uniform(0.001, 0.01, (*blocks.shape[:2], 1)).astype(np.float32)
        blocks[..., :4] = scale.view(np.uint8)
    if name == "IQ1_M":
        blocks[..., 55] = blocks[..., 55] & 0x0F | 0x10  # 0x1___: 0.0005 to 0.002
    return torch.from_numpy(blocks)


def oracle(name: str, blocks: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of blocks uint8 [N, B, block_bytes], by gguf-py."""
    if name in _TRANSCRIBED:
        return torch.from_numpy(_TRANSCRIBED[name](blocks.numpy())).flatten(1)
    rows = np.ascontiguousarray(blocks.flatten(1).numpy())
    return torch.from_numpy(np.array(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[name])))


def _q1_0(blocks: np.ndarray) -> np.ndarray:
    """``dequantize_row_q1_0`` of ggml-quants.c, transcribed: uint8 [..., 18] -> [..., 128]."""
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    return np.where(bits, d, -d)


def _q2_0(blocks: np.ndarray) -> np.ndarray:
    """``dequantize_row_q2_0`` of ggml-quants.c, transcribed: uint8 [..., 18] -> [..., 64]."""
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    j = np.arange(64)
    return ((blocks[..., 2 + j // 4] >> j % 4 * 2 & 3).astype(np.float32) - 1) * d


def _q8_1(blocks: np.ndarray) -> np.ndarray:
    """What ``quantize_row_q8_1_ref`` of ggml-quants.c rounds, back: [..., 36] -> [..., 32]."""
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    return blocks[..., 4:].view(np.int8) * d


def _q8_k(blocks: np.ndarray) -> np.ndarray:
    """``dequantize_row_q8_K`` of ggml-quants.c, transcribed: uint8 [..., 292] -> [..., 256]."""
    d = np.ascontiguousarray(blocks[..., :4]).view(np.float32)
    return blocks[..., 4:260].view(np.int8) * d


# Types that gguf-py does not decode.
_TRANSCRIBED = {"Q1_0": _q1_0, "Q2_0": _q2_0, "Q8_1": _q8_1, "Q8_K": _q8_k}


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal as float32 bit patterns; any NaN equals any other."""
    assert got.dtype == wanted.dtype == torch.float32
    assert got.shape == wanted.shape
    same = (got.view(torch.int32) == wanted.view(torch.int32)) | (got.isnan() & wanted.isnan())
    assert same.all(), f"{(~same).sum()} differ, first at {(~same).nonzero()[0].tolist()}"
