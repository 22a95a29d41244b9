"""NVFP4: 64 weights in 36 bytes, 4.5 bits each, in 4 groups of 16: ``w = d * VALUES[q]``.

Layout (``block_nvfp4`` in ggml-common.h; VALUES as in MXFP4, the scales halved to match):
    byte 0   d    uint8 [4]: a scale per group, unsigned E4M3
    byte 4   qs   uint8 [4, 8]: weights j and j + 8 of group i in the low and high nibble of (i, j)

Shapes: see ``base.py``. Planes per block: qs uint8 [32], d uint8 [4].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import join_bytes, look_up
from oxillama_torch.kernels.formats.mxfp4 import LOOKUP, TABLE, VALUES
from oxillama_torch.kernels.formats.pair_codes import coded_tile
from oxillama_torch.kernels.formats.tile import coded_nibbles, jit, tl


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 4:], "d": blocks[..., :4]}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs)


def scale(d: Tensor) -> Tensor:
    """Half the value of unsigned E4M3 bytes; 0x7F, its NaN, counts as 0 (ggml_ue4m3_to_fp32)."""
    # The same exponent and mantissa bits in a float16 are 2^8 times smaller.
    half = ((d & 0x7F).short() << 7).view(torch.float16)
    return (half.float() * 128).masked_fill(d == 0x7F, 0)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    lead = qs.shape[:-1]
    qs = qs.view(*lead, 4, 8)
    values = look_up(torch.cat((qs & 15, qs >> 4), -1), VALUES)
    out.view(*lead, 4, 16).copy_(values).mul_(scale(d).unsqueeze(-1))


@jit
def scale_tile(p_d, s_d, rows, row_mask, group):
    """``scale``, float32 [BLOCK_N, groups]."""
    d_at = p_d + rows[:, None] * s_d + group[None, :]
    e = tl.load(d_at, mask=row_mask[:, None], other=0).to(tl.int16)
    d = ((e & 0x7F) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 128.0
    return tl.where(e == 0x7F, 0.0, d)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d; then the table of VALUES."""
    group = k0 // 16 + tl.arange(0, BLOCK_K // 16)
    mask = row_mask[:, None]
    d = scale_tile(p1, s1, rows, row_mask, group)
    byte = (group * 8)[:, None] + tl.arange(0, 8)[None, :]
    qs = tl.load(p0 + rows[:, None, None] * s0 + byte[None], mask=mask[:, :, None], other=0)
    w = coded_nibbles(p3, qs.to(tl.int32)) * d[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pair_codes``."""
    group = k0 // 16 + tl.arange(0, BLOCK_K // 16)
    d = scale_tile(p1, s1, rows, row_mask, group)
    word = (group * 2)[:, None] + tl.arange(0, 2)[None, :]
    return coded_tile(p0, s0, rows, row_mask, word, d, p3, LOOKUP)


FORMAT = Format(
    GGMLType.NVFP4,
    {"qs": 32, "d": 4},
    split,
    join,
    decode,
    decode_tile,
    TABLE,
    decode_pairs=decode_pairs,
)
