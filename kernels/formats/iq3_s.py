"""IQ3_S: 256 weights in 110 bytes, 3.44 bits each, in 8 groups of 32: ``w = d*(2 s + 1) * v``.

v: entries of 4 values of the codebook IQ3_S, with signs.

Layout (``block_iq3_s`` in ggml-common.h):
    byte 0     d       float16
    byte 2     qs      uint8 [64]: low bits of the entries
    byte 66    qh      uint8 [8]: bit i of byte j is the high bit of entry 8 j + i
    byte 74    signs   uint8 [32]: bit j of byte i is the sign of weight 8 i + j
    byte 106   scales  uint8 [4]: s[2 i] in the low nibble, s[2 i + 1] in the high one

Shapes: see ``base.py``. Planes per block: qs uint8 [64], high uint8 [44] (qh, signs, scales),
d float16 [1].
"""

from __future__ import annotations

from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import bit_planes, float16_at, join_bytes, nibble_pairs
from oxillama_torch.kernels.formats.tile import jit, small_to_float, take8, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:66], "high": blocks[..., 66:], "d": float16_at(blocks, 0)}


def join(qs: Tensor, high: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs, high)


def decode(out: Tensor, qs: Tensor, high: Tensor, d: Tensor) -> None:
    qh, signs, scales = high.split((8, 32, 4), dim=-1)
    index = qs | bit_planes(qh, 0).short() << 8
    factors = d.float() * (2 * nibble_pairs(scales) + 1)
    grids.decode_signed(out, grids.IQ3_S, index, signs, factors)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, high, d; then the codebook."""
    mask = row_mask[:, None]
    quad = k0 // 4 + tl.arange(0, BLOCK_K // 4)
    q = tl.load(p0 + rows[:, None] * s0 + quad[None, :], mask=mask, other=0).to(tl.int32)
    high = p1 + rows[:, None] * s1 + k0 // 256 * 44
    group = k0 % 256 // 32 + tl.arange(0, BLOCK_K // 32)
    qh = tl.load(high + group[None, :], mask=mask, other=0).to(tl.int32)
    octet = k0 % 256 // 8 + tl.arange(0, BLOCK_K // 8)
    signs = tl.load(high + 8 + octet[None, :], mask=mask, other=0).to(tl.int32)
    w = grids.signed_tile(tl.load(p3 + (q | take8(qh << 8, 1, 256))), signs)
    pair = k0 % 256 // 64 + tl.arange(0, BLOCK_K // 64)
    scales = tl.load(high + 40 + pair[None, :], mask=mask, other=0).to(tl.int32)
    s = tl.join(scales & 15, scales >> 4).reshape(BLOCK_N, BLOCK_K // 32)
    d = tl.load(p2 + rows * s2 + k0 // 256, mask=row_mask, other=0.0).to(tl.float32)
    scale = d[:, None] * small_to_float(2 * s + 1, 0)
    w = w.reshape(BLOCK_N, BLOCK_K // 32, 32) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ3_S,
    {"qs": 64, "high": 44, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ3_S.words,
)
