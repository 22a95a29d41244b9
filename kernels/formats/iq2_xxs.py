"""IQ2_XXS: 256 weights in 66 bytes, 2.06 bits each, in 8 groups of 32: ``w = d*(s + 0.5)/4 * v``.

v: entries of 8 values of the codebook IQ2_XXS, with signs.

Layout (``block_iq2_xxs`` in ggml-common.h):
    byte 0   d    float16
    byte 2   qs   [8], one per group: uint8 [4], entries of the codebook, then uint32: the signs of
                  their weights (``grids.even_signs``) and in bits 28-31 s

Shapes: see ``base.py``. Planes per block: qs uint8 [32], signs int32 [8] (with s), d float16 [1].
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
    groups = blocks[..., 2:].unflatten(-1, (8, 8))
    return {
        "qs": groups[..., :4].flatten(-2),
        "signs": words(groups[..., 4:].flatten(-2), torch.int32),
        "d": float16_at(blocks, 0),
    }


def join(qs: Tensor, signs: Tensor, d: Tensor) -> Tensor:
    signs = signs.contiguous().view(torch.uint8).unflatten(-1, (8, 4))
    return join_bytes(d, torch.cat((qs.unflatten(-1, (8, 4)), signs), -1).flatten(-2))


def decode(out: Tensor, qs: Tensor, signs: Tensor, d: Tensor) -> None:
    scales = d.float() * ((signs >> 28 & 15) + 0.5) * 0.25
    grids.decode_signed(out, grids.IQ2_XXS, qs, grids.even_signs(signs), scales)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, signs, d; then the codebook."""
    mask = row_mask[:, None]
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    packed = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0)
    d = tl.load(p2 + rows[:, None] * s2 + (group // 8)[None, :], mask=mask, other=0.0)
    scale = d.to(tl.float32) * (small_to_float((packed >> 28) & 15, 0) + 0.5) * 0.25
    octet = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    q = tl.load(p0 + rows[:, None] * s0 + octet[None, :], mask=mask, other=0).to(tl.int32)
    signs = grids.even_signs_tile(take4(packed, 7, 127))
    w = grids.signed_tile(grids.octets_tile(p3, q), signs)
    w = w.reshape(BLOCK_N, BLOCK_K // 32, 32) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ2_XXS,
    {"qs": 32, "signs": 8, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ2_XXS.words,
)
