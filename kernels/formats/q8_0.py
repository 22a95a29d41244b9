"""Q8_0: 32 weights in 34 bytes, 8.5 bits each: ``w = d * q``.

Layout (``block_q8_0`` in ggml-common.h):
    byte 0   d    float16
    byte 2   qs   int8 [32]

Shapes: see ``base.py``. Planes per block: qs int8 [32], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:].view(torch.int8), "d": float16_at(blocks, 0)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    out.copy_(qs).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d."""
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    k = k0 + tl.arange(0, BLOCK_K)
    mask = row_mask[:, None]
    d = tl.load(p1 + rows[:, None] * s1 + group[None, :], mask=mask, other=0.0).to(tl.float32)
    q = tl.load(p0 + rows[:, None] * s0 + k[None, :], mask=mask, other=0).to(tl.float32)
    w = q.reshape(BLOCK_N, BLOCK_K // 32, 32) * d[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(GGMLType.Q8_0, {"qs": 32, "d": 1}, split, join, decode, decode_tile)
