"""Q8_K: 256 values in 292 bytes, 9.13 bits each: ``w = d * q``.

ggml keeps activations in it on their way into products with the K and IQ types, and writes it to no
file; a file that holds it all the same is served.

Layout (``block_q8_K`` in ggml-common.h):
    byte 0     d       float32
    byte 4     qs      int8 [256]
    byte 260   bsums   int16 [16]: sums of 16 quants each, for integer products

Shapes: see ``base.py``. Planes per block: qs int8 [256], bsums int16 [16], d float32 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import join_bytes
from oxillama_torch.kernels.formats.tile import jit, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 4:260].view(torch.int8),
        "bsums": blocks[..., 260:].view(torch.int16),
        "d": blocks[..., :4].view(torch.float32),
    }


def join(qs: Tensor, bsums: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs, bsums)


def decode(out: Tensor, qs: Tensor, bsums: Tensor, d: Tensor) -> None:
    out.copy_(qs).mul_(d)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, bsums, d."""
    k = k0 + tl.arange(0, BLOCK_K)
    q = tl.load(p0 + rows[:, None] * s0 + k[None, :], mask=row_mask[:, None], other=0)
    d = tl.load(p2 + rows * s2 + k0 // 256, mask=row_mask, other=0.0)
    return q.to(tl.float32) * d[:, None]


FORMAT = Format(
    GGMLType.Q8_K,
    {"qs": 256, "bsums": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
)
