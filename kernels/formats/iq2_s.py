"""IQ2_S: 256 weights in 82 bytes, 2.56 bits each, in 16 groups of 16: ``w = d*(s + 0.5)/4 * v``.

v: entries of 8 values of the codebook IQ2_S, with signs.

Layout (``block_iq2_s`` in ggml-common.h):
    byte 0    d       float16
    byte 2    qs      uint8 [32]: low bits of the entries
    byte 34   signs   uint8 [32]: bit j of byte i is the sign of weight 8 i + j
    byte 66   qh      uint8 [8]: bits 2 i, 2 i + 1 of byte j are the high bits of entry 4 j + i
    byte 74   scales  uint8 [8]: s[2 i] in the low nibble, s[2 i + 1] in the high one

Shapes: see ``base.py``. Planes per block: qs uint8 [64] (qs, signs), high uint8 [16] (qh, scales),
d float16 [1].
"""

from __future__ import annotations

from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import crumbs, float16_at, join_bytes, nibble_pairs
from oxillama_torch.kernels.formats.iq2_xs import scales_tile
from oxillama_torch.kernels.formats.tile import jit, take4, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:66], "high": blocks[..., 66:], "d": float16_at(blocks, 0)}


def join(qs: Tensor, high: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs, high)


def decode(out: Tensor, qs: Tensor, high: Tensor, d: Tensor) -> None:
    qh, scales = high.split(8, dim=-1)
    index = qs[..., :32] | crumbs(qh).transpose(-1, -2).flatten(-2).short() << 8
    factors = d.float() * (nibble_pairs(scales) + 0.5) * 0.25
    grids.decode_signed(out, grids.IQ2_S, index, qs[..., 32:], factors)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, high, d; then the codebook."""
    mask = row_mask[:, None]
    octet = k0 % 256 // 8 + tl.arange(0, BLOCK_K // 8)
    at = p0 + rows[:, None] * s0 + (k0 // 256 * 64 + octet)[None, :]
    q = tl.load(at, mask=mask, other=0).to(tl.int32)
    signs = tl.load(at + 32, mask=mask, other=0).to(tl.int32)
    byte = k0 // 256 * 16 + k0 % 256 // 32 + tl.arange(0, BLOCK_K // 32)
    qh = tl.load(p1 + rows[:, None] * s1 + byte[None, :], mask=mask, other=0).to(tl.int32)
    q |= take4(qh << 8, 2, 0x300)
    w = grids.signed_tile(grids.octets_tile(p3, q), signs)
    scale = scales_tile(p1, p2, s1, s2, rows, row_mask, k0, 8, 16, BLOCK_K)
    w = w.reshape(BLOCK_N, BLOCK_K // 16, 16) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ2_S,
    {"qs": 64, "high": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ2_S.words,
)
