"""IQ3_XXS: 256 weights in 98 bytes, 3.06 bits each, in 8 groups of 32: ``w = d*(s + 0.5)/2 * v``.

v: entries of 4 values of the codebook IQ3_XXS, with signs.

Layout (``block_iq3_xxs`` in ggml-common.h):
    byte 0    d    float16
    byte 2    qs   uint8 [64]: entries of the codebook
    byte 66   gas  uint32 [8]: the signs of a group (``grids.even_signs``) and in bits 28-31 s

Shapes: see ``base.py``. Planes per block: qs uint8 [64], signs int32 [8] (gas), d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes, words
from oxillama_torch.kernels.formats.tile import jit, small_to_float, take4, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 2:66],
        "signs": words(blocks[..., 66:], torch.int32),
        "d": float16_at(blocks, 0),
    }


def join(qs: Tensor, signs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs, signs)


def decode(out: Tensor, qs: Tensor, signs: Tensor, d: Tensor) -> None:
    scales = d.float() * ((signs >> 28 & 15) + 0.5) * 0.5
    grids.decode_signed(out, grids.IQ3_XXS, qs, grids.even_signs(signs), scales)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, signs, d; then the codebook."""
    mask = row_mask[:, None]
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    packed = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0)
    d = tl.load(p2 + rows * s2 + k0 // 256, mask=row_mask, other=0.0).to(tl.float32)
    scale = d[:, None] * (small_to_float((packed >> 28) & 15, 0) + 0.5) * 0.5
    quad = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    q = tl.load(p0 + rows[:, None] * s0 + quad[None, :], mask=mask, other=0).to(tl.int32)
    signs = grids.even_signs_tile(take4(packed, 7, 127))
    w = grids.signed_tile(tl.load(p3 + q), signs)
    w = w.reshape(BLOCK_N, BLOCK_K // 32, 32) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ3_XXS,
    {"qs": 64, "signs": 8, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ3_XXS.words,
)
