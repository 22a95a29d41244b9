"""Q6_K: 256 weights in 210 bytes, 6.56 bits each, in 16 groups of 16: ``w = (d*sc) * (q - 32)``.

Layout (``block_q6_K`` in ggml-common.h):
    byte 0     ql      uint8 [2, 64]: low 4 bits
    byte 128   qh      uint8 [2, 32]: high 2 bits
    byte 192   scales  int8 [16]
    byte 208   d       float16
Weight 128 h + 32 i + j (i < 4) has its low bits in ql[h, 32 (i % 2) + j], low nibble for i < 2,
else the high one, and its high bits in bits 2 i and 2 i + 1 of qh[h, j].

Shapes: see ``base.py``. Planes per block: ql uint8 [128], qh uint8 [64], scales int8 [16],
d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "ql": blocks[..., :128],
        "qh": blocks[..., 128:192],
        "scales": blocks[..., 192:208].view(torch.int8),
        "d": float16_at(blocks, 208),
    }


def join(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    return join_bytes(ql, qh, scales, d)


def decode(out: Tensor, ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> None:
    lead = ql.shape[:-1]
    ql, qh = ql.view(*lead, 2, 2, 32), qh.view(*lead, 2, 32)
    q = torch.cat((ql & 15, ql >> 4), -2)
    q |= torch.stack((qh << 4, qh << 2, qh, qh >> 2), -2).bitwise_and_(0x30)
    out.copy_(q.sub_(32).view(torch.int8).view(*lead, 256))
    out.view(*lead, 16, 16).mul_((d.float() * scales).unsqueeze(-1))


@jit
def half_tile(p_ql, p_qh, s_ql, s_qh, rows, row_mask, half):
    """Quants of whole halves of blocks, int32 [BLOCK_N, halves, 2, 2, 32]; each byte read once."""
    j = tl.arange(0, 32)
    row, mask = rows[:, None, None], row_mask[:, None, None]
    low_at = p_ql + row * s_ql + ((half * 64)[:, None] + j[None, :])[None]
    high_at = p_qh + row * s_qh + ((half * 32)[:, None] + j[None, :])[None]
    a = tl.load(low_at, mask=mask, other=0).to(tl.int32)
    b = tl.load(low_at + 32, mask=mask, other=0).to(tl.int32)
    high = tl.load(high_at, mask=mask, other=0).to(tl.int32)
    first = tl.join(a & 15 | (high & 3) << 4, b & 15 | (high & 12) << 2)
    second = tl.join(a >> 4 | high & 48, b >> 4 | (high >> 2) & 48)
    return tl.join(first, second).permute(0, 1, 4, 3, 2)


@jit
def quarter_tile(p_ql, p_qh, s_ql, s_qh, rows, row_mask, k0):
    """Quants of one aligned run of 64 weights, int32 [BLOCK_N, 2, 32]."""
    at = k0 // 128 * 32 + tl.arange(0, 32)
    shift = k0 // 64 % 2 * 4
    mask = row_mask[:, None]
    low_at = p_ql + rows[:, None] * s_ql + (at + k0 // 128 * 32)[None, :]
    a = tl.load(low_at, mask=mask, other=0).to(tl.int32) >> shift
    b = tl.load(low_at + 32, mask=mask, other=0).to(tl.int32) >> shift
    high_at = p_qh + rows[:, None] * s_qh + at[None, :]
    high = tl.load(high_at, mask=mask, other=0).to(tl.int32) >> shift
    return tl.join(a & 15 | (high & 3) << 4, b & 15 | (high & 12) << 2).permute(0, 2, 1)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: ql, qh, scales, d."""
    if BLOCK_K == 64:
        q = quarter_tile(p0, p1, s0, s1, rows, row_mask, k0)
    else:
        half = k0 // 128 + tl.arange(0, BLOCK_K // 128)
        q = half_tile(p0, p1, s0, s1, rows, row_mask, half)
    group = k0 // 16 + tl.arange(0, BLOCK_K // 16)
    mask = row_mask[:, None]
    d = tl.load(p3 + rows[:, None] * s3 + (group // 16)[None, :], mask=mask, other=0.0)
    scale = tl.load(p2 + rows[:, None] * s2 + group[None, :], mask=mask, other=0)
    factor = d.to(tl.float32) * scale.to(tl.float32)
    w = small_to_float(q, 32).reshape(BLOCK_N, BLOCK_K // 16, 16) * factor[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def run_tile(low, high, p_scales, p_d, s_scales, s_d, rows, row_mask, side, run):
    """A run of 32 of each half: words of its low and of its high bits, in place -> its weights."""
    at = p_scales + rows[:, None] * s_scales + (side // 2 * 8 + run * 2 + side % 2)[None, :]
    scale = tl.load(at, mask=row_mask[:, None], other=0).to(tl.float32)
    d = pairs.load_half(p_d, s_d, rows, row_mask, side // 4)
    return pairs.scaled(pairs.exact(low | high, 32), d * scale)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    side = pairs.sides(k0, BLOCK_K)
    word = tl.arange(0, 4)[None, :]
    low_at = (side // 2 * 16 + side % 2 * 4)[:, None] + word
    a = pairs.load_fours(p0, s0, rows, row_mask, low_at)
    b = pairs.load_fours(p0, s0, rows, row_mask, low_at + 8)
    high = pairs.load_fours(p1, s1, rows, row_mask, (side * 4)[:, None] + word)
    first = 0
    if BLOCK_K == 64:
        first = k0 // 64 % 2 * 2
        a, b, high = a >> 2 * first, b >> 2 * first, high >> 2 * first
    q0 = run_tile(
        a & 0x0F0F0F0F, (high & 0x03030303) << 4, p2, p3, s2, s3, rows, row_mask, side, first
    )
    q1 = run_tile(
        b & 0x0F0F0F0F, (high & 0x0C0C0C0C) << 2, p2, p3, s2, s3, rows, row_mask, side, first + 1
    )  # fmt: skip
    if BLOCK_K == 64:
        return pairs.two_runs(q0, q1)
    else:
        a, b = (a >> 4) & 0x0F0F0F0F, (b >> 4) & 0x0F0F0F0F
        q2 = run_tile(a, high & 0x30303030, p2, p3, s2, s3, rows, row_mask, side, 2)
        q3 = run_tile(b, (high >> 2) & 0x30303030, p2, p3, s2, s3, rows, row_mask, side, 3)
        return pairs.four_runs(q0, q1, q2, q3)


FORMAT = Format(
    GGMLType.Q6_K,
    {"ql": 128, "qh": 64, "scales": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
