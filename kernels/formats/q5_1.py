"""Q5_1: 32 weights in 24 bytes, 6 bits each: ``w = d * q + m``.

Layout (``block_q5_1`` in ggml-common.h):
    byte 0   d, m   float16 [2]
    byte 4   qh     uint32      as in Q5_0
    byte 8   qs     uint8 [16]  as in Q5_0

Shapes: see ``base.py``. Planes per block: qs uint8 [16], qh int32 [1], dm float16 [2] (d, m).
"""

from __future__ import annotations

from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, int32_at, join_bytes
from oxillama_torch.kernels.formats.q5_0 import fours_tile, quants, quants_tile
from oxillama_torch.kernels.formats.tile import jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 8:], "qh": int32_at(blocks, 4), "dm": float16_at(blocks, 0, 2)}


def join(qs: Tensor, qh: Tensor, dm: Tensor) -> Tensor:
    return join_bytes(dm, qh, qs)


def decode(out: Tensor, qs: Tensor, qh: Tensor, dm: Tensor) -> None:
    dm = dm.float()
    out.copy_(quants(qs, qh)).mul_(dm[..., :1]).add_(dm[..., 1:])


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, qh, dm."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    mask = row_mask[:, None]
    dm_at = p2 + rows[:, None] * s2 + (block * 2)[None, :]
    d = tl.load(dm_at, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(dm_at + 1, mask=mask, other=0.0).to(tl.float32)
    q = quants_tile(p0, p1, s0, s1, rows, row_mask, block)
    w = small_to_float(q, 0) * d[:, :, None] + m[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d, m = pairs.load_halves(p2, s2, rows, row_mask, block)
    low, high = fours_tile(p0, p1, s0, s1, rows, row_mask, block)
    low = pairs.scaled_less(pairs.exact(low, 0), d, -m)
    return pairs.low_and_high(low, pairs.scaled_less(pairs.exact(high, 0), d, -m))


FORMAT = Format(
    GGMLType.Q5_1,
    {"qs": 16, "qh": 1, "dm": 2},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
