"""TQ1_0: 256 ternary weights in 54 bytes, 1.69 bits each: ``w = d * (t - 1)``.

A byte is a fraction of 256 whose first five base-3 digits are weights t: multiplying by 3^n modulo
256 brings digit n to the front, and the digit is ``3 * byte >> 8``.

Layout (``block_tq1_0`` in ggml-common.h):
    byte 0    qs   uint8 [48]: digit n of byte j < 32 is weight 32 n + j; digit n of byte 32 + j
                   is weight 160 + 16 n + j
    byte 48   qh   uint8 [4]: digit n < 4 of byte j is weight 240 + 4 n + j
    byte 52   d    float16

Shapes: see ``base.py``. Planes per block: qs uint8 [52] (qs, then qh), d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., :52], "d": float16_at(blocks, 52)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(qs, d)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    parts = qs.split((32, 16, 4), dim=-1)
    digits = [torch.stack([part * 3**n for n in range(count)], -2).flatten(-2)
              for part, count in zip(parts, (5, 5, 4))]  # fmt: skip
    trits = torch.cat(digits, -1).short().mul_(3).bitwise_right_shift_(8)
    out.copy_(trits.sub_(1)).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d."""
    k = k0 % 256 + tl.arange(0, BLOCK_K)
    digit = tl.where(k < 160, k // 32, tl.where(k < 240, (k - 160) // 16, (k - 240) // 4))
    byte = tl.where(k < 160, k % 32, tl.where(k < 240, 32 + k % 16, 48 + k % 4))
    power = tl.where(digit < 2, tl.where(digit == 0, 1, 3), tl.where(digit == 2, 9, 27))
    power = tl.where(digit == 4, 81, power)
    at = p0 + rows[:, None] * s0 + (k0 // 256 * 52 + byte)[None, :]
    qs = tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32)
    trit = ((qs * power[None, :]) & 255) * 3 >> 8
    d = tl.load(p1 + rows * s1 + k0 // 256, mask=row_mask, other=0.0).to(tl.float32)
    return small_to_float(trit, 1) * d[:, None]


FORMAT = Format(GGMLType.TQ1_0, {"qs": 52, "d": 1}, split, join, decode, decode_tile)
