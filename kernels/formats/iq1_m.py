"""IQ1_M: 256 weights in 56 bytes, 1.75 bits each, in 16 groups of 16: ``w = d*(2 s + 1)*(v + e)``.

v: entries of 8 values of the codebook IQ1_S; e: 1/8 or -1/8.

Layout (``block_iq1_m`` in ggml-common.h):
    byte 0    qs      uint8 [32]: low bits of the entries
    byte 32   qh      uint8 [16]: low nibble for entry 2 i, high nibble for 2 i + 1: 3 high bits of
                      the entry, and e is negative where the fourth is set
    byte 48   scales  uint16 [4]: s[4 i + j] in bits 3 j to 3 j + 2; the top nibbles, the lowest
                      first, are the float16 d

Shapes: see ``base.py``. Planes per block: qs uint8 [32], qh uint8 [16], scales int16 [4].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import join_bytes, nibble_pairs
from oxillama_torch.kernels.formats.iq1_s import DELTA
from oxillama_torch.kernels.formats.tile import jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., :32],
        "qh": blocks[..., 32:48],
        "scales": blocks[..., 48:].view(torch.int16),
    }


def join(qs: Tensor, qh: Tensor, scales: Tensor) -> Tensor:
    return join_bytes(qs, qh, scales)


def decode(out: Tensor, qs: Tensor, qh: Tensor, scales: Tensor) -> None:
    qh = nibble_pairs(qh)
    delta = torch.where(qh > 7, -DELTA, DELTA)
    shifts = torch.arange(0, 12, 3, dtype=torch.int16, device=qh.device)
    s = (scales.unsqueeze(-1) >> shifts & 7).flatten(-2)
    factors = block_scale(scales) * (2 * s + 1)
    grids.decode_ternary(out, qs | (qh & 7).short() << 8, delta, factors)


def block_scale(scales: Tensor) -> Tensor:
    """d: int16 [..., 4] -> float32 [..., 1]."""
    a, b, c, d = (scales >> 12 & 15).unbind(-1)
    return (a | b << 4 | c << 8 | d << 12).view(torch.float16).float().unsqueeze(-1)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, qh, scales; then the codebook."""
    mask = row_mask[:, None]
    octet = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    q = tl.load(p0 + rows[:, None] * s0 + octet[None, :], mask=mask, other=0).to(tl.int32)
    group = k0 // 16 + tl.arange(0, BLOCK_K // 16)
    qh = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0).to(tl.int32)
    qh = tl.join(qh & 15, qh >> 4).reshape(BLOCK_N, BLOCK_K // 8)
    word = p2 + rows * s2 + k0 // 256 * 4
    a = tl.load(word, mask=row_mask, other=0).to(tl.int32)
    b = tl.load(word + 1, mask=row_mask, other=0).to(tl.int32)
    c = tl.load(word + 2, mask=row_mask, other=0).to(tl.int32)
    d = tl.load(word + 3, mask=row_mask, other=0).to(tl.int32)
    d = (a >> 12) & 15 | (b >> 8) & 240 | (c >> 4) & 3840 | d & 61440
    d = d.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    packed = tl.load(p2 + rows[:, None] * s2 + (group // 4)[None, :], mask=mask, other=0)
    s = (packed.to(tl.int32) >> (group % 4 * 3)[None, :]) & 7
    scale = d[:, None] * small_to_float(2 * s + 1, 0)
    delta = tl.where(qh > 7, -0.125, 0.125)
    w = grids.ternary_tile(p3, q | (qh & 7) << 8, delta)
    w = w.reshape(BLOCK_N, BLOCK_K // 16, 16) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ1_M,
    {"qs": 32, "qh": 16, "scales": 4},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ1_S.crumbs,
)
