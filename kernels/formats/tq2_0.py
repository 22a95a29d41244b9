"""TQ2_0: 256 ternary weights in 66 bytes, 2.06 bits each: ``w = d * (q - 1)``.

Layout (``block_tq2_0`` in ggml-common.h):
    byte 0    qs   uint8 [2, 32]: weight 128 h + 32 i + j in bits 2 i, 2 i + 1 of byte (h, j)
    byte 64   d    float16

Shapes: see ``base.py``. Planes per block: qs uint8 [64], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import crumbs, float16_at, join_bytes
from oxillama_torch.kernels.formats.tile import crumbs_tile, jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., :64], "d": float16_at(blocks, 64)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(qs, d)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    lead = qs.shape[:-1]
    q = crumbs(qs.view(*lead, 2, 32)).sub_(1).view(torch.int8)
    out.copy_(q.view(*lead, 256)).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d."""
    q = small_to_float(crumbs_tile(p0, s0, rows, row_mask, k0, BLOCK_N, BLOCK_K), 1)
    d = tl.load(p1 + rows * s1 + k0 // 256, mask=row_mask, other=0.0).to(tl.float32)
    return q.reshape(BLOCK_N, BLOCK_K) * d[:, None]


@jit
def run_tile(q, d):
    """A run of 32 of each half: its quants, four to an int32 -> its weights, in words of two."""
    return pairs.scaled(pairs.exact(q & 0x03030303, 1), d)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    side = pairs.sides(k0, BLOCK_K)
    d = pairs.load_half(p1, s1, rows, row_mask, side // 4)
    q = pairs.load_fours(p0, s0, rows, row_mask, (side * 4)[:, None] + tl.arange(0, 4)[None, :])
    if BLOCK_K == 64:
        q = q >> k0 // 64 % 2 * 4
        return pairs.two_runs(run_tile(q, d), run_tile(q >> 2, d))
    else:
        q0, q1, q2, q3 = (
            run_tile(q, d),
            run_tile(q >> 2, d),
            run_tile(q >> 4, d),
            run_tile(q >> 6, d),
        )
        return pairs.four_runs(q0, q1, q2, q3)


FORMAT = Format(
    GGMLType.TQ2_0,
    {"qs": 64, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
