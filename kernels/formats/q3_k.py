"""Q3_K: 256 weights in 110 bytes, 3.44 bits each, in 16 groups of 16: ``w = (d*sc) * (q - 4)``.

Layout (``block_q3_K`` in ggml-common.h):
    byte 0     hmask   uint8 [32]: bit i of byte j is the high bit of weight 32 i + j
    byte 32    qs      uint8 [2, 32]: low bits, as in Q2_K
    byte 96    scales  uint8 [12]: sc[16] of 6 bits each, 32 too large; see ``split_scales``
    byte 108   d       float16

Shapes: see ``base.py``. Planes per block: qs uint8 [64], hmask uint8 [32], scales int8 [16],
d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import crumbs, float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import crumbs_tile, jit, small_to_float, tl


def split_scales(packed: Tensor) -> Tensor:
    """uint8 [..., 12] -> int8 [..., 16], -32 to 31.

    The low nibbles of sc[0:8] and sc[8:16] share bytes 0-7; bits 2 i, 2 i + 1 of byte 8 + j are the
    high bits of sc[4 i + j]. Source: ``dequantize_row_q3_K`` in ggml-quants.c.
    """
    low = torch.cat((packed[..., :8] & 15, packed[..., :8] >> 4), -1)
    high = crumbs(packed[..., 8:]).flatten(-2) << 4
    return (low | high).sub_(32).view(torch.int8)


def join_scales(scales: Tensor) -> Tensor:
    """The inverse of ``split_scales``: int8 [..., 16] -> uint8 [..., 12]."""
    sc = scales.contiguous().view(torch.uint8) + 32
    low = sc[..., :8] & 15 | (sc[..., 8:] & 15) << 4
    a, b, c, d = (sc >> 4).split(4, dim=-1)
    return torch.cat((low, a | b << 2 | c << 4 | d << 6), -1)


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 32:96],
        "hmask": blocks[..., :32],
        "scales": split_scales(blocks[..., 96:108]),
        "d": float16_at(blocks, 108),
    }


def join(qs: Tensor, hmask: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    return join_bytes(hmask, qs, join_scales(scales), d)


def decode(out: Tensor, qs: Tensor, hmask: Tensor, scales: Tensor, d: Tensor) -> None:
    lead = qs.shape[:-1]
    q = crumbs(qs.view(*lead, 2, 32)).view(*lead, 8, 32)
    high = (hmask << 2, hmask << 1, hmask, *(hmask >> i for i in range(1, 6)))
    q |= torch.stack(high, -2).bitwise_and_(4)
    out.copy_(q.sub_(4).view(torch.int8).view(*lead, 256))
    out.view(*lead, 16, 16).mul_((d.float() * scales).unsqueeze(-1))


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, hmask, scales, d."""
    run = k0 // 32 + tl.arange(0, BLOCK_K // 32)  # 32 weights that share a bit of hmask
    byte = (run // 8 * 32)[:, None] + tl.arange(0, 32)[None, :]
    mask = row_mask[:, None]
    hmask = tl.load(p1 + rows[:, None, None] * s1 + byte[None], mask=mask[:, :, None], other=0)
    high = (hmask.to(tl.int32) >> (run % 8)[None, :, None]) & 1
    q = crumbs_tile(p0, s0, rows, row_mask, k0, BLOCK_N, BLOCK_K) | high << 2
    group = k0 // 16 + tl.arange(0, BLOCK_K // 16)
    d = tl.load(p3 + rows[:, None] * s3 + (group // 16)[None, :], mask=mask, other=0.0)
    scale = tl.load(p2 + rows[:, None] * s2 + group[None, :], mask=mask, other=0)
    factor = d.to(tl.float32) * scale.to(tl.float32)
    w = small_to_float(q, 4).reshape(BLOCK_N, BLOCK_K // 16, 16) * factor[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def run_tile(q, high, p_scales, s_scales, rows, row_mask, side, run, d):
    """A run of 32 of each half: low bits, high bits, four to an int32 -> words of its weights."""
    at = p_scales + rows[:, None] * s_scales + (side // 2 * 8 + run * 2 + side % 2)[None, :]
    scale = tl.load(at, mask=row_mask[:, None], other=0).to(tl.float32)
    return pairs.scaled(pairs.exact(q & 0x03030303 | (high & 0x01010101) << 2, 4), d * scale)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    side = pairs.sides(k0, BLOCK_K)
    d = pairs.load_half(p3, s3, rows, row_mask, side // 4)
    word = tl.arange(0, 4)[None, :]
    q = pairs.load_fours(p0, s0, rows, row_mask, (side * 4)[:, None] + word)
    high_at = (side // 4 * 8 + side % 2 * 4)[:, None] + word
    high = pairs.load_fours(p1, s1, rows, row_mask, high_at) >> (side // 2 % 2 * 4)[None, :, None]
    first = 0
    if BLOCK_K == 64:
        first = k0 // 64 % 2 * 2
        q, high = q >> 2 * first, high >> first
    q0 = run_tile(q, high, p2, s2, rows, row_mask, side, first, d)
    q1 = run_tile(q >> 2, high >> 1, p2, s2, rows, row_mask, side, first + 1, d)
    if BLOCK_K == 64:
        return pairs.two_runs(q0, q1)
    else:
        q2 = run_tile(q >> 4, high >> 2, p2, s2, rows, row_mask, side, 2, d)
        q3 = run_tile(q >> 6, high >> 3, p2, s2, rows, row_mask, side, 3, d)
        return pairs.four_runs(q0, q1, q2, q3)


FORMAT = Format(
    GGMLType.Q3_K,
    {"qs": 64, "hmask": 32, "scales": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
