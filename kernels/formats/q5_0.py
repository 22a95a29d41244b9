"""Q5_0: 32 weights in 22 bytes, 5.5 bits each: ``w = d * (q - 16)``.

Layout (``block_q5_0`` in ggml-common.h):
    byte 0   d    float16
    byte 2   qh   uint32, not aligned: bit j is the high bit of weight j
    byte 6   qs   uint8 [16]: low bits of weight j in the low nibble of byte j, those of weight
                  j + 16 in the high one

Shapes: see ``base.py``. Planes per block: qs uint8 [16], qh int32 [1], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import bit_planes, float16_at, int32_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, nibbles, small_to_float, take4, take8, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 6:], "qh": int32_at(blocks, 2), "d": float16_at(blocks, 0)}


def join(qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qh, qs)


def decode(out: Tensor, qs: Tensor, qh: Tensor, d: Tensor) -> None:
    out.copy_(quants(qs, qh).sub_(16).view(torch.int8)).mul_(d.float())


def quants(qs: Tensor, qh: Tensor) -> Tensor:
    """The 5-bit quants that Q5_0 and Q5_1 have in common, 0 to 31: uint8 [..., 32]."""
    low = torch.cat((qs & 15, qs >> 4), -1)
    return low.bitwise_or_(bit_planes(qh.view(torch.uint8), 4))


@jit
def quants_tile(p_qs, p_qh, s_qs, s_qh, rows, row_mask, block):
    """The same for a tile: int32 [BLOCK_N, blocks, 32]; ``block`` is int32 [blocks]."""
    byte = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    mask = row_mask[:, None]
    qs = tl.load(p_qs + rows[:, None, None] * s_qs + byte[None], mask=mask[:, :, None], other=0)
    qh = tl.load(p_qh + rows[:, None] * s_qh + block[None, :], mask=mask, other=0)
    low = nibbles(qs.to(tl.int32))
    return low | take8(take4(qh, 8, 255) << 4, 1, 16).reshape(low.shape)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, qh, d."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d_at = p2 + rows[:, None] * s2 + block[None, :]
    d = tl.load(d_at, mask=row_mask[:, None], other=0.0).to(tl.float32)
    q = quants_tile(p0, p1, s0, s1, rows, row_mask, block)
    w = small_to_float(q, 16) * d[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def fours_tile(p_qs, p_qh, s_qs, s_qh, rows, row_mask, block):
    """Quants four to an int32 [BLOCK_N, blocks, 4]: of the first 16 weights, of the others."""
    word = tl.arange(0, 4)
    at = (block * 4)[:, None] + word[None, :]
    qs = pairs.load_fours(p_qs, s_qs, rows, row_mask, at)
    qh_at = p_qh + rows[:, None] * s_qh + block[None, :]
    qh = tl.load(qh_at, mask=row_mask[:, None], other=0)[:, :, None] >> (word * 4)[None, None, :]
    # Four neighbouring bits, one to each byte, as bit 4 there.
    low = qs & 0x0F0F0F0F | ((qh & 15) * 0x02040810) & 0x10101010
    return low, (qs >> 4) & 0x0F0F0F0F | (((qh >> 16) & 15) * 0x02040810) & 0x10101010


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = pairs.load_half(p2, s2, rows, row_mask, block)
    low, high = fours_tile(p0, p1, s0, s1, rows, row_mask, block)
    low = pairs.scaled(pairs.exact(low, 16), d)
    return pairs.low_and_high(low, pairs.scaled(pairs.exact(high, 16), d))


FORMAT = Format(
    GGMLType.Q5_0,
    {"qs": 16, "qh": 1, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
