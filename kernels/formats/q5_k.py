"""Q5_K: 256 weights in 176 bytes, 5.5 bits each, in 8 groups of 32: ``w = (d*sc) * q - dmin*m``.

Layout (``block_q5_K`` in ggml-common.h):
    byte 0    d, dmin  float16 [2]
    byte 4    scales   uint8 [12]: as in Q4_K
    byte 16   qh       uint8 [32]: bit i of byte j is the high bit of weight 32 i + j
    byte 48   qs       uint8 [4, 32]: low bits, as in Q4_K

Shapes: see ``base.py``. Planes per block: qs uint8 [128], qh uint8 [32], scales uint8 [16]
(sc, then m), dm float16 [2] (d, dmin).
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import (
    float16_at,
    join_bytes,
    join_scales6,
    split_scales6,
)
from oxillama_torch.kernels.formats.q4_k import apply_scales, pair_scales, scales_tile
from oxillama_torch.kernels.formats.tile import jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 48:],
        "qh": blocks[..., 16:48],
        "scales": split_scales6(blocks[..., 4:16]),
        "dm": float16_at(blocks, 0, 2),
    }


def join(qs: Tensor, qh: Tensor, scales: Tensor, dm: Tensor) -> Tensor:
    return join_bytes(dm, join_scales6(scales), qh, qs)


def decode(out: Tensor, qs: Tensor, qh: Tensor, scales: Tensor, dm: Tensor) -> None:
    lead = qs.shape[:-1]
    low, high = out.view(*lead, 4, 2, 32).unbind(-2)
    # Bit i of qh, moved to bit 4, belongs to group i: even i to low nibbles, odd i to high ones.
    even = torch.stack((qh << 4, qh << 2, qh, qh >> 2), -2).bitwise_and_(16)
    odd = torch.stack((qh << 3, qh << 1, qh >> 1, qh >> 3), -2).bitwise_and_(16)
    qs = qs.view(*lead, 4, 32)
    low.copy_(even.bitwise_or_(qs & 15))
    high.copy_(odd.bitwise_or_(qs >> 4))
    apply_scales(out, scales, dm)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, qh, scales, dm."""
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d, dmin = scales_tile(p2, p3, s2, s3, rows, row_mask, group)
    # Two groups share their low bytes, eight their high ones; the pair's bits of qh come first.
    pair = k0 // 64 + tl.arange(0, BLOCK_K // 64)
    j = tl.arange(0, 32)
    row, mask = rows[:, None, None], row_mask[:, None, None]
    low_at = p0 + row * s0 + ((pair * 32)[:, None] + j[None, :])[None]
    high_at = p1 + row * s1 + ((pair // 4 * 32)[:, None] + j[None, :])[None]
    low = tl.load(low_at, mask=mask, other=0).to(tl.int32)
    high = tl.load(high_at, mask=mask, other=0).to(tl.int32) >> (pair % 4 * 2)[None, :, None]
    q = tl.join(low & 15 | (high & 1) << 4, low >> 4 | (high & 2) << 3)
    q = q.permute(0, 1, 3, 2).reshape(BLOCK_N, BLOCK_K // 32, 32)
    w = small_to_float(q, 0) * d[:, :, None] - dmin[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    pair = k0 // 64 + tl.arange(0, BLOCK_K // 64)
    d0, d1, m0, m1 = pair_scales(p2, p3, s2, s3, rows, row_mask, pair)
    word = tl.arange(0, 8)[None, :]
    qs = pairs.load_fours(p0, s0, rows, row_mask, (pair * 8)[:, None] + word)
    qh = pairs.load_fours(p1, s1, rows, row_mask, (pair // 4 * 8)[:, None] + word)
    qh = qh >> (pair % 4 * 2)[None, :, None]
    low = qs & 0x0F0F0F0F | (qh & 0x01010101) << 4
    high = (qs >> 4) & 0x0F0F0F0F | (qh & 0x02020202) << 3
    low = pairs.scaled_less(pairs.exact(low, 0), d0, m0)
    return pairs.low_and_high(low, pairs.scaled_less(pairs.exact(high, 0), d1, m1))


FORMAT = Format(
    GGMLType.Q5_K,
    {"qs": 128, "qh": 32, "scales": 16, "dm": 2},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
