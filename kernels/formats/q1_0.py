"""Q1_0: 128 weights in 18 bytes, 1.125 bits each: ``w = d`` where the bit is set, else ``-d``.

Layout (``block_q1_0`` in ggml-common.h; OxiLLaMa calls it Q1_0_G128):
    byte 0   d    float16
    byte 2   qs   uint8 [16]: weight j is bit j % 8 of byte j // 8

Shapes: see ``base.py``. Planes per block: qs uint8 [16], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import bit_planes, float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, small_to_float, take8, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:], "d": float16_at(blocks, 0)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    out.copy_(bit_planes(qs, 1).sub_(1).view(torch.int8)).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d."""
    byte = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    mask = row_mask[:, None]
    qs = tl.load(p0 + rows[:, None] * s0 + byte[None, :], mask=mask, other=0).to(tl.int32)
    run = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = tl.load(p1 + rows[:, None] * s1 + (run // 4)[None, :], mask=mask, other=0.0)
    sign = small_to_float(take8(qs << 1, 1, 2), 1).reshape(BLOCK_N, BLOCK_K // 32, 32)
    return (sign * d.to(tl.float32)[:, :, None]).reshape(BLOCK_N, BLOCK_K)


@jit
def four_signed(bits, minus, FIRST: tl.constexpr):
    """Four words of two weights from bit FIRST of int32 [BLOCK_N, runs] on: [..., 1, 4].

    ``minus`` is twice the bfloat16 ``-d``, whose signs the bits of a word turn.
    """
    a, b = pairs.signed(bits, minus, FIRST), pairs.signed(bits, minus, FIRST + 2)
    c, d = pairs.signed(bits, minus, FIRST + 4), pairs.signed(bits, minus, FIRST + 6)
    return pairs.four_each(a, b, c, d)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    run = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = pairs.load_half(p1, s1, rows, row_mask, run // 4)
    bits = pairs.load_fours(p0, s0, rows, row_mask, run[:, None])
    minus = pairs.twice(-d)[:, :, None]
    words = pairs.four_each(
        four_signed(bits, minus, 0),
        four_signed(bits, minus, 8),
        four_signed(bits, minus, 16),
        four_signed(bits, minus, 24),
    )
    return pairs.in_order(words.reshape(BLOCK_N, BLOCK_K // 32, 4, 4).permute(0, 1, 3, 2))


FORMAT = Format(
    GGMLType.Q1_0,
    {"qs": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
