"""MXFP4: 32 weights in 17 bytes, 4.25 bits each: ``w = 2^(e - 128) * VALUES[q]``.

OCP Microscaling: E2M1 values with an E8M0 scale; ggml doubles the values and halves the scale.

Layout (``block_mxfp4`` in ggml-common.h):
    byte 0   e    uint8: exponent of the scale
    byte 1   qs   uint8 [16]: weight j in the low nibble of byte j, weight j + 16 in the high one

Shapes: see ``base.py``. Planes per block: qs uint8 [16], e uint8 [1].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import join_bytes, look_up, nibble_table
from oxillama_torch.kernels.formats.pair_codes import coded_tile, lookup
from oxillama_torch.kernels.formats.tile import coded_nibbles, jit, tl

# ``kvalues_mxfp4`` in ggml-common.h: E2M1, times two.
VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
TABLE = functools.partial(nibble_table, VALUES)
LOOKUP = lookup(VALUES)


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 1:], "e": blocks[..., :1]}


def join(qs: Tensor, e: Tensor) -> Tensor:
    return join_bytes(e, qs)


def decode(out: Tensor, qs: Tensor, e: Tensor) -> None:
    # The bits of 2^(e - 128), which is subnormal for e of 0 and 1. Source: ggml_e8m0_to_fp32_half.
    e = e.int()
    scale = torch.where(e < 2, 0x00200000 << e, (e - 1) << 23).view(torch.float32)
    out.copy_(look_up(torch.cat((qs & 15, qs >> 4), -1), VALUES)).mul_(scale)


@jit
def scale_tile(p_e, s_e, rows, row_mask, block):
    """``2^(e - 128)``, float32 [BLOCK_N, blocks]."""
    e_at = p_e + rows[:, None] * s_e + block[None, :]
    e = tl.load(e_at, mask=row_mask[:, None], other=0).to(tl.int32)
    return tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, e; then the table of VALUES."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    mask = row_mask[:, None]
    scale = scale_tile(p1, s1, rows, row_mask, block)
    byte = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    qs = tl.load(p0 + rows[:, None, None] * s0 + byte[None], mask=mask[:, :, None], other=0)
    w = coded_nibbles(p3, qs.to(tl.int32)) * scale[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pair_codes``."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    scale = scale_tile(p1, s1, rows, row_mask, block)
    word = (block * 4)[:, None] + tl.arange(0, 4)[None, :]
    return coded_tile(p0, s0, rows, row_mask, word, scale, p3, LOOKUP)


FORMAT = Format(
    GGMLType.MXFP4,
    {"qs": 16, "e": 1},
    split,
    join,
    decode,
    decode_tile,
    TABLE,
    decode_pairs=decode_pairs,
)
