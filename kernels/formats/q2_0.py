"""Q2_0: 64 weights in 18 bytes, 2.25 bits each: ``w = d * (q - 1)``.

Layout (``block_q2_0`` in ggml-common.h):
    byte 0   d    float16
    byte 2   qs   uint8 [16]: weight j in bits 2 (j % 4), 2 (j % 4) + 1 of byte j // 4

Shapes: see ``base.py``. Planes per block: qs uint8 [16], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import crumbs, float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, small_to_float, take4, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:], "d": float16_at(blocks, 0)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    q = crumbs(qs).transpose(-1, -2).flatten(-2).sub_(1).view(torch.int8)
    out.copy_(q).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d."""
    byte = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    mask = row_mask[:, None]
    qs = tl.load(p0 + rows[:, None] * s0 + byte[None, :], mask=mask, other=0).to(tl.int32)
    run = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = tl.load(p1 + rows[:, None] * s1 + (run // 2)[None, :], mask=mask, other=0.0)
    q = small_to_float(take4(qs, 2, 3), 1).reshape(BLOCK_N, BLOCK_K // 32, 32)
    return (q * d.to(tl.float32)[:, :, None]).reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    run = k0 // 32 + tl.arange(0, BLOCK_K // 32)  # 32 weights in eight bytes
    d = pairs.load_half(p1, s1, rows, row_mask, run // 2)
    word = (run * 2)[:, None] + tl.arange(0, 2)[None, :]
    qs = pairs.load_fours(p0, s0, rows, row_mask, word)
    high = qs >> 4  # the third and the fourth quant of each byte
    first = pairs.four_each(
        pairs.crumbs(qs, 0), pairs.crumbs(high, 0),
        pairs.crumbs(qs, 1), pairs.crumbs(high, 1),
    )  # fmt: skip
    second = pairs.four_each(
        pairs.crumbs(qs, 2), pairs.crumbs(high, 2),
        pairs.crumbs(qs, 3), pairs.crumbs(high, 3),
    )  # fmt: skip
    words = tl.join(first, second).reshape(BLOCK_N, BLOCK_K // 32, 2, 4, 2)
    words = words.permute(0, 1, 2, 4, 3).reshape(BLOCK_N, BLOCK_K // 32, 16)
    return pairs.in_order(pairs.scaled(words, d))


FORMAT = Format(
    GGMLType.Q2_0,
    {"qs": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
