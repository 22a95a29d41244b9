"""IQ2_XS: 256 weights in 74 bytes, 2.31 bits each, in 16 groups of 16: ``w = d*(s + 0.5)/4 * v``.

v: entries of 8 values of the codebook IQ2_XS, with signs.

Layout (``block_iq2_xs`` in ggml-common.h):
    byte 0    d       float16
    byte 2    qs      uint16 [32]: bits 0-8 an entry of the codebook, bits 9-15 the signs of its
                      first 7 weights; that of the eighth makes their number even
    byte 66   scales  uint8 [8]: s[2 i] in the low nibble, s[2 i + 1] in the high one

Shapes: see ``base.py``. Planes per block: qs int16 [32], scales uint8 [8], d float16 [1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes, nibble_pairs
from oxillama_torch.kernels.formats.tile import jit, small_to_float, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {
        "qs": blocks[..., 2:66].view(torch.int16),
        "scales": blocks[..., 66:],
        "d": float16_at(blocks, 0),
    }


def join(qs: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs, scales)


def decode(out: Tensor, qs: Tensor, scales: Tensor, d: Tensor) -> None:
    signs = grids.with_parity((qs >> 9 & 127).to(torch.uint8))
    factors = d.float() * (nibble_pairs(scales) + 0.5) * 0.25
    grids.decode_signed(out, grids.IQ2_XS, qs & 511, signs, factors)


@jit
def scales_tile(p_scales, p_d, s_scales, s_d, rows, row_mask, k0, FIRST: tl.constexpr,
                WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """``d*(s + 0.5)/4`` per 16 weights, [BLOCK_N, BLOCK_K // 16].

    The scales of a block are bytes FIRST to FIRST + 7 of WIDTH in their plane.
    """
    mask = row_mask[:, None]
    group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    at = p_scales + rows[:, None] * s_scales + (group // 8 * WIDTH + FIRST + group % 8)[None, :]
    scales = tl.load(at, mask=mask, other=0).to(tl.int32)
    s = tl.join(scales & 15, scales >> 4).reshape(scales.shape[0], BLOCK_K // 16)
    d = tl.load(p_d + rows * s_d + k0 // 256, mask=row_mask, other=0.0).to(tl.float32)
    return d[:, None] * (small_to_float(s, 0) + 0.5) * 0.25


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, scales, d; then the codebook."""
    octet = k0 // 8 + tl.arange(0, BLOCK_K // 8)
    at = p0 + rows[:, None] * s0 + octet[None, :]
    q = tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32)
    signs = grids.even_signs_tile((q >> 9) & 127)
    w = grids.signed_tile(grids.octets_tile(p3, q & 511), signs)
    scale = scales_tile(p1, p2, s1, s2, rows, row_mask, k0, 0, 8, BLOCK_K)
    w = w.reshape(BLOCK_N, BLOCK_K // 16, 16) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


FORMAT = Format(
    GGMLType.IQ2_XS,
    {"qs": 32, "scales": 8, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    table=grids.IQ2_XS.words,
)
