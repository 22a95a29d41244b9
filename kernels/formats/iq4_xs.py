"""IQ4_XS: 256 weights in 136 bytes, 4.25 bits each, in 8 groups of 32: ``w = (d*sc) * VALUES[q]``.

Layout (``block_iq4_xs`` in ggml-common.h; VALUES as in IQ4_NL):
    byte 0   d         float16
    byte 2   scales_h  uint16: bits 2 i, 2 i + 1 are the high bits of sc[i]
    byte 4   scales_l  uint8 [4]: low bits of sc[2 i] (low nibble), sc[2 i + 1] (high); 32 is added
    byte 8   qs        uint8 [8, 16]: each group as a block of IQ4_NL

Shapes: see ``base.py``. Planes per block: qs uint8 [128], scales int8 [8], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import (
    crumbs,
    float16_at,
    join_bytes,
    look_up,
    nibble_pairs,
)
from oxillama_torch.kernels.formats.iq4_nl import LOOKUP, TABLE, VALUES
from oxillama_torch.kernels.formats.pair_codes import coded_tile
from oxillama_torch.kernels.formats.pairs import load_half
from oxillama_torch.kernels.formats.tile import coded_nibbles, jit, tl


def split_scales(high: Tensor, low: Tensor) -> Tensor:
    """High bits uint8 [..., 2] and low bits uint8 [..., 4] -> int8 [..., 8], -32 to 31."""
    high = crumbs(high).transpose(-1, -2).flatten(-2) << 4
    return (nibble_pairs(low) | high).sub_(32).view(torch.int8)


def join_scales(scales: Tensor) -> Tensor:
    """The inverse of ``split_scales``, high bits first: int8 [..., 8] -> uint8 [..., 6]."""
    sc = scales.contiguous().view(torch.uint8) + 32
    a, b, c, d = (sc >> 4).unflatten(-1, (2, 4)).unbind(-1)
    return torch.cat((a | b << 2 | c << 4 | d << 6, sc[..., ::2] & 15 | sc[..., 1::2] << 4), -1)


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 8:],
        "scales": split_scales(blocks[..., 2:4], blocks[..., 4:8]),
        "d": float16_at(blocks, 0),
    }


def join(qs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, join_scales(scales), qs)


def decode(out: Tensor, qs: Tensor, scales: Tensor, d: Tensor) -> None:
    lead = qs.shape[:-1]
    factors = (d.float() * scales).unsqueeze(-1)
    qs = qs.view(*lead, 8, 16)
    values = look_up(torch.cat((qs & 15, qs >> 4), -1), VALUES)
    out.view(*lead, 8, 32).copy_(values).mul_(factors)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, scales, d; then the table of VALUES."""
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    mask = row_mask[:, None]
    d = tl.load(p2 + rows[:, None] * s2 + (group // 8)[None, :], mask=mask, other=0.0)
    scale = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0)
    byte = (group * 16)[:, None] + tl.arange(0, 16)[None, :]
    qs = tl.load(p0 + rows[:, None, None] * s0 + byte[None], mask=mask[:, :, None], other=0)
    factor = d.to(tl.float32) * scale.to(tl.float32)
    w = coded_nibbles(p3, qs.to(tl.int32)) * factor[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pair_codes``."""
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = load_half(p2, s2, rows, row_mask, group // 8)
    scale_at = p1 + rows[:, None] * s1 + group[None, :]
    scale = tl.load(scale_at, mask=row_mask[:, None], other=0).to(tl.float32)
    word = (group * 4)[:, None] + tl.arange(0, 4)[None, :]
    return coded_tile(p0, s0, rows, row_mask, word, d * scale, p3, LOOKUP)


FORMAT = Format(
    GGMLType.IQ4_XS,
    {"qs": 128, "scales": 8, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    TABLE,
    decode_pairs=decode_pairs,
)
