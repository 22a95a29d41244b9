"""Q4_0: 32 weights in 18 bytes, 4.5 bits each: ``w = d * (q - 8)``.

Layout (``block_q4_0`` in ggml-common.h):
    byte 0   d    float16
    byte 2   qs   uint8 [16]: weight j in the low nibble of byte j, weight j + 16 in the high one

Shapes: see ``base.py``. Planes per block: qs uint8 [16], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, nibbles, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:], "d": float16_at(blocks, 0)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    q = torch.cat((qs & 15, qs >> 4), -1).sub_(8).view(torch.int8)
    out.copy_(q).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    mask = row_mask[:, None]
    d = tl.load(p1 + rows[:, None] * s1 + block[None, :], mask=mask, other=0.0).to(tl.float32)
    byte = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    qs = tl.load(p0 + rows[:, None, None] * s0 + byte[None], mask=mask[:, :, None], other=0)
    q = nibbles(qs.to(tl.int32))
    w = small_to_float(q, 8) * d[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = pairs.load_half(p1, s1, rows, row_mask, block)
    word = (block * 4)[:, None] + tl.arange(0, 4)[None, :]
    qs = pairs.load_fours(p0, s0, rows, row_mask, word)
    low = pairs.scaled(pairs.exact(qs & 0x0F0F0F0F, 8), d)
    high = pairs.scaled(pairs.exact((qs >> 4) & 0x0F0F0F0F, 8), d)
    return pairs.low_and_high(low, high)


FORMAT = Format(
    GGMLType.Q4_0, {"qs": 16, "d": 1}, split, join, decode, decode_tile, decode_pairs=decode_pairs
)
