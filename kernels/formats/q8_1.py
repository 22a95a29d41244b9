"""Q8_1: 32 values in 36 bytes, 9 bits each: ``w = d * q``.

ggml keeps activations in it on their way into products with Q4_1, Q5_1 and others, and writes it to
no file; a file that holds it all the same is served.

Layout (``block_q8_1`` in ggml-common.h):
    byte 0   d, s   float16 [2]; s, d times the sum of the quants, is for integer products
    byte 4   qs     int8 [32]

Shapes: see ``base.py``. Planes per block: qs int8 [32], ds float16 [2].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import jit, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 4:].view(torch.int8), "ds": float16_at(blocks, 0, 2)}


def join(qs: Tensor, ds: Tensor) -> Tensor:
    return join_bytes(ds, qs)


def decode(out: Tensor, qs: Tensor, ds: Tensor) -> None:
    out.copy_(qs).mul_(ds[..., :1].float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, ds."""
    mask = row_mask[:, None]
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = tl.load(p1 + rows[:, None] * s1 + (block * 2)[None, :], mask=mask, other=0.0)
    k = k0 + tl.arange(0, BLOCK_K)
    q = tl.load(p0 + rows[:, None] * s0 + k[None, :], mask=mask, other=0).to(tl.float32)
    w = q.reshape(BLOCK_N, BLOCK_K // 32, 32) * d.to(tl.float32)[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(GGMLType.Q8_1, {"qs": 32, "ds": 2}, split, join, decode, decode_tile)
