"""IQ1_S: 256 weights in 50 bytes, 1.56 bits each, in 8 groups of 32: ``w = d*(2 s + 1)*(v + e)``.

v: entries of 8 values of the codebook IQ1_S; e: 1/8 or -1/8.

Layout (``block_iq1_s`` in ggml-common.h):
    byte 0    d    float16
    byte 2    qs   uint8 [32]: low bits of the entries
    byte 34   qh   uint16 [8], one per group: high bits of entry i in bits 3 i to 3 i + 2, s in bits
                   12-14; e is negative where bit 15 is set

Shapes: see ``base.py``. Planes per block: qs uint8 [32], qh int16 [8], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, small_to_float, take4, tl

DELTA = 0.125  # ``IQ1S_DELTA`` in ggml-common.h


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 2:34],
        "qh": blocks[..., 34:].view(torch.int16),
        "d": float16_at(blocks, 0),
    }


def join(qs: Tensor, qh: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs, qh)


def decode(out: Tensor, qs: Tensor, qh: Tensor, d: Tensor) -> None:
    shifts = torch.arange(0, 12, 3, dtype=torch.int16, device=qh.device)
    high = (qh.unsqueeze(-1) >> shifts & 7).flatten(-2)
    delta = torch.where(qh < 0, -DELTA, DELTA)
    scales = d.float() * (2 * (qh >> 12 & 7) + 1)
    grids.decode_ternary(out, qs | high << 8, delta, scales)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, qh, d; then the codebook."""
    mask = row_mask[:, None]
    octet = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    q = tl.load(p0 + rows[:, None] * s0 + octet[None, :], mask=mask, other=0).to(tl.int32)
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    qh = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0).to(tl.int32)
    d = tl.load(p2 + rows * s2 + k0 // 256, mask=row_mask, other=0.0).to(tl.float32)
    scale = d[:, None] * small_to_float((qh >> 11) & 14 | 1, 0)
    delta = tl.where(qh < 0, -0.125, 0.125)
    delta = tl.broadcast_to(delta[:, :, None], (BLOCK_N, BLOCK_K // 32, 4))
    index = q | take4(qh << 8, 3, 0x700)
    w = grids.ternary_tile(p3, index, delta.reshape(BLOCK_N, BLOCK_K // 8))
    w = w.reshape(BLOCK_N, BLOCK_K // 32, 32) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ1_S,
    {"qs": 32, "qh": 8, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ1_S.crumbs,
)
