"""IQ4_NL: 32 weights in 18 bytes, 4.5 bits each: ``w = d * VALUES[q]``.

Layout (``block_iq4_nl`` in ggml-common.h):
    byte 0   d    float16
    byte 2   qs   uint8 [16]: weight j in the low nibble of byte j, weight j + 16 in the high one

Shapes: see ``base.py``. Planes per block: qs uint8 [16], d float16 [1].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels.formats.base import Format
from oxillama_torch.kernels.formats.bits import float16_at, join_bytes, look_up, nibble_table
from oxillama_torch.kernels.formats.pair_codes import coded_tile, lookup
from oxillama_torch.kernels.formats.pairs import load_half
from oxillama_torch.kernels.formats.tile import coded_nibbles, jit, tl

# ``kvalues_iq4nl`` in ggml-common.h, from -127 to 113: dense where weights are.
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TABLE = functools.partial(nibble_table, VALUES)
LOOKUP = lookup(VALUES)


def split(blocks: Tensor) -> dict[str, Tensor]:
    return {"qs": blocks[..., 2:], "d": float16_at(blocks, 0)}


def join(qs: Tensor, d: Tensor) -> Tensor:
    return join_bytes(d, qs)


def decode(out: Tensor, qs: Tensor, d: Tensor) -> None:
    out.copy_(look_up(torch.cat((qs & 15, qs >> 4), -1), VALUES)).mul_(d.float())


@jit
def decode_tile(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Planes: qs, d; then the table of VALUES."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    mask = row_mask[:, None]
    d = tl.load(p1 + rows[:, None] * s1 + block[None, :], mask=mask, other=0.0).to(tl.float32)
    byte = (block * 16)[:, None] + tl.arange(0, 16)[None, :]
    qs = tl.load(p0 + rows[:, None, None] * s0 + byte[None], mask=mask[:, :, None], other=0)
    w = coded_nibbles(p3, qs.to(tl.int32)) * d[:, :, None]
    return w.reshape(BLOCK_N, BLOCK_K)


@jit
def decode_pairs(
    p0, p1, p2, p3, s0, s1, s2, s3, rows, row_mask, k0, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``decode_tile`` by ``pair_codes``."""
    block = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    d = load_half(p1, s1, rows, row_mask, block)
    word = (block * 4)[:, None] + tl.arange(0, 4)[None, :]
    return coded_tile(p0, s0, rows, row_mask, word, d, p3, LOOKUP)


FORMAT = Format(
    GGMLType.IQ4_NL,
    {"qs": 16, "d": 1},
    split,
    join,
    decode,
    decode_tile,
    TABLE,
    decode_pairs=decode_pairs,
)
