"""Bit-level helpers that several formats share.

Shapes: ``...`` leading dimensions (rows and blocks), last dimension the bytes or values of a block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = [
    "bit_planes",
    "crumbs",
    "float16_at",
    "int32_at",
    "join_bytes",
    "join_scales6",
    "look_up",
    "nibble_pairs",
    "nibble_table",
    "split_scales6",
    "words",
]


def float16_at(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """``count`` little-endian float16 at byte ``start`` of each block: [..., count]."""
    return blocks[..., start : start + 2 * count].view(torch.float16)


def int32_at(blocks: Tensor, start: int) -> Tensor:
    """The little-endian 32 bits at byte ``start`` of each block, aligned or not: [..., 1]."""
    return words(blocks[..., start : start + 4], torch.int32)


def words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Little-endian integers, aligned or not: uint8 [..., n] -> ``dtype`` [..., n / size]."""
    # A copy always: a lone block counts as contiguous wherever it starts.
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)


def join_bytes(*fields: Tensor) -> Tensor:
    """Blocks uint8 [..., block_bytes] from fields of any dtype in the order of the struct."""
    return torch.cat([f.contiguous().view(torch.uint8) for f in fields], dim=-1)


def bit_planes(packed: Tensor, position: int) -> Tensor:
    """uint8 [..., n] -> [..., 8 n]: bit j % 8 of byte j // 8 as bit ``position`` of byte j."""
    # Eight bytes at a time in 64-bit words, as shifting bytes by a tensor is ten times slower:
    # copy the byte to all eight, keep one bit in each, and add what carries it into bit 7.
    spread = packed.long().mul_(0x0101010101010101).bitwise_and_(_signed(0x8040201008040201))
    spread.add_(0x00406070787C7E7F).bitwise_right_shift_(7 - position)
    return spread.bitwise_and_(0x0101010101010101 << position).view(torch.uint8)


def crumbs(packed: Tensor) -> Tensor:
    """2-bit fields of bytes, low bits first: uint8 [..., n] -> [..., 4, n]."""
    return torch.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), -2)


@functools.cache
def nibble_table(values: tuple[int, ...], device: torch.device) -> Tensor:
    """What a byte of two codes means, int16 [256]: 128 + value of the low nibble, of the high one.

    Args:
        values: 16 integers from -127 to 127.
    """
    biased = torch.tensor(values, dtype=torch.int16) + 128
    pairs = biased[None, :] | biased[:, None] << 8
    return pairs.flatten().to(device)


def nibble_pairs(packed: Tensor) -> Tensor:
    """Low and high nibble of each byte in turn: uint8 [..., n] -> [..., 2 n]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def look_up(q: Tensor, values: tuple[int, ...]) -> Tensor:
    """``values[q]`` as int8, for codes q uint8 of any shape."""
    table = torch.tensor(values, dtype=torch.int8, device=q.device)
    return table.index_select(0, q.flatten().int()).view(q.shape)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64)


def split_scales6(packed: Tensor) -> Tensor:
    """8 scales and 8 mins of 6 bits from 12 bytes: uint8 [..., 12] -> [..., 16] (sc, then m).

    Bytes 0-3 hold sc[0:4] in their low 6 bits, bytes 4-7 m[0:4]; bytes 8-11 hold the low 4 bits of
    sc[4:8] (low nibble) and m[4:8] (high nibble), whose top 2 bits are the top bits of bytes 0-7.
    Source: ``get_scale_min_k4`` in ggml-quants.c.
    """
    first, low = packed[..., :8], packed[..., 8:]
    # sc[0:4], m[0:4] = first & 63, and the top bits of the second four move to bits 4 and 5.
    small, high = first & 0x3F, (first >> 2) & 0x30
    sc = torch.cat((small[..., :4], (low & 0x0F) | high[..., :4]), -1)
    m = torch.cat((small[..., 4:], (low >> 4) | high[..., 4:]), -1)
    return torch.cat((sc, m), -1)


def join_scales6(scales: Tensor) -> Tensor:
    """The inverse of ``split_scales6``: uint8 [..., 16] -> [..., 12]."""
    sc_small, sc_large, m_small, m_large = scales.split(4, dim=-1)
    return torch.cat(
        (
            sc_small | (sc_large & 0x30) << 2,
            m_small | (m_large & 0x30) << 2,
            (sc_large & 0x0F) | m_large << 4,
        ),
        -1,
    )
