"""Q4_K: 256 weights in 144 bytes, 4.5 bits each, in 8 groups of 32: ``w = (d*sc) * q - dmin*m``.

Layout (``block_q4_K`` in ggml-common.h):
    byte 0    d, dmin  float16 [2]
    byte 4    scales   uint8 [12]: sc[8] and m[8] of 6 bits each, see ``bits.split_scales6``
    byte 16   qs       uint8 [4, 32]: byte (i, j) holds weight 64 i + j in its low nibble and weight
                       64 i + 32 + j in its high one

Shapes: see ``base.py``. Planes per block: qs uint8 [128], scales uint8 [16] (sc, then m),
dm float16 [2] (d, dmin).
"""

from __future__ import annotations

from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import pairs
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import (
    float16_at,
    join_bytes,
    join_scales6,
    split_scales6,
)
from oxillama_torch.kernels.formats.tile import jit, nibbles, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 16:],
        "scales": split_scales6(blocks[..., 4:16]),
        "dm": float16_at(blocks, 0, 2),
    }


def join(qs: Tensor, scales: Tensor, dm: Tensor) -> Tensor:
    return join_bytes(dm, join_scales6(scales), qs)


def decode(out: Tensor, qs: Tensor, scales: Tensor, dm: Tensor) -> None:
    lead = qs.shape[:-1]
    low, high = out.view(*lead, 4, 2, 32).unbind(-2)
    qs = qs.view(*lead, 4, 32)
    low.copy_(qs & 15)
    high.copy_(qs >> 4)
    apply_scales(out, scales, dm)


def apply_scales(out: Tensor, scales: Tensor, dm: Tensor) -> None:
    """``out = (d*sc) * out - dmin*m`` per group of 32, for Q4_K and Q5_K."""
    dm = dm.float()
    d, m = dm[..., :1] * scales[..., :8], dm[..., 1:] * scales[..., 8:]
    out.view(*out.shape[:-1], 8, 32).mul_(d.unsqueeze(-1)).sub_(m.unsqueeze(-1))


@jit
def scales_tile(p_scales, p_dm, s_scales, s_dm, rows, row_mask, group):
    """``d*sc`` and ``dmin*m`` of a tile: two float32 [BLOCK_N, groups]; ``group`` is int32."""
    mask = row_mask[:, None]
    scale_at = p_scales + rows[:, None] * s_scales + (group // 8 * 16 + group % 8)[None, :]
    dm_at = p_dm + rows[:, None] * s_dm + (group // 8 * 2)[None, :]
    d = tl.load(dm_at, mask=mask, other=0.0).to(tl.float32)
    dmin = tl.load(dm_at + 1, mask=mask, other=0.0).to(tl.float32)
    d *= tl.load(scale_at, mask=mask, other=0).to(tl.float32)
    dmin *= tl.load(scale_at + 8, mask=mask, other=0).to(tl.float32)
    return d, dmin


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, scales, dm."""
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d, dmin = scales_tile(p1, p2, s1, s2, rows, row_mask, group)
    pair = k0 // 64 + tl.arange(0, BLOCK_K // 64)
    byte = (pair * 32)[:, None] + tl.arange(0, 32)[None, :]
    mask = row_mask[:, None, None]
    qs = tl.load(p0 + rows[:, None, None] * s0 + byte[None], mask=mask, other=0)
    q = nibbles(qs.to(tl.int32)).reshape(BLOCK_N, BLOCK_K // 32, 32)
    w = small_to_float(q, 0) * d[:, :, None] - dmin[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def pair_scales(p_scales, p_dm, s_scales, s_dm, rows, row_mask, pair):
    """``d*sc`` and ``dmin*m`` of two groups of 32 each: four float32 [BLOCK_N, pairs]."""
    at = (rows * (s_scales // 2))[:, None] + (pair // 4 * 8 + pair % 4)[None, :]
    at = p_scales.to(tl.pointer_type(tl.uint16)) + at
    sc = tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32)
    m = tl.load(at + 4, mask=row_mask[:, None], other=0).to(tl.int32)
    d, dmin = pairs.load_halves(p_dm, s_dm, rows, row_mask, pair // 4)
    sc0, sc1 = small_to_float(sc & 255, 0), small_to_float(sc >> 8, 0)
    m0, m1 = small_to_float(m & 255, 0), small_to_float(m >> 8, 0)
    return d * sc0, d * sc1, dmin * m0, dmin * m1


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pairs``."""
    pair = k0 // 64 + tl.arange(0, BLOCK_K // 64)
    d0, d1, m0, m1 = pair_scales(p1, p2, s1, s2, rows, row_mask, pair)
    word = (pair * 8)[:, None] + tl.arange(0, 8)[None, :]
    qs = pairs.load_fours(p0, s0, rows, row_mask, word)
    low = pairs.scaled_less(pairs.exact(qs & 0x0F0F0F0F, 0), d0, m0)
    high = pairs.scaled_less(pairs.exact((qs >> 4) & 0x0F0F0F0F, 0), d1, m1)
    return pairs.low_and_high(low, high)


FORMAT = Format(
    GGMLType.Q4_K,
    {"qs": 128, "scales": 16, "dm": 2},
    split,
    join,
    decode,
    decode_tile,
    decode_pairs=decode_pairs,
)
