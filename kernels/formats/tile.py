"""``jit`` and ``tl`` for tile decoders, with or without Triton.

Formats must decode on machines that have no Triton (the torch paths need none), so their files
take both names from here. Without Triton a tile decoder is None, and the kernels that would use it
do not load either.
"""

from __future__ import annotations

__all__ = [
    "coded_nibbles",
    "crumbs_tile",
    "jit",
    "nibbles",
    "small_to_float",
    "take4",
    "take8",
    "tl",
]

try:
    import triton.language as tl
    from triton import jit
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "triton":
        raise
    tl = None

    def jit(function: object) -> None:
        """Stand in for ``triton.jit``."""


@jit
def small_to_float(q, offset: tl.constexpr):
    """float32 ``q - offset`` of int32 q from 0 to 2^23 - 1, exactly.

    Puts q into the mantissa of 2^23 and subtracts: two instructions at full rate, where integer
    conversions run at a fraction of it.
    """
    return (q | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + offset)


@jit
def nibbles(packed):
    """int32 bytes [BLOCK_N, groups, n] -> [BLOCK_N, groups, 2 n]: low nibbles, then high ones.

    Joined in registers, so that each byte is read once.
    """
    pairs = tl.join(packed & 15, packed >> 4)
    return pairs.permute(0, 1, 3, 2).reshape(packed.shape[0], packed.shape[1], 2 * packed.shape[2])


@jit
def coded_nibbles(table, packed):
    """Values of the ``nibbles`` of int32 bytes, by a ``bits.nibble_table``: float32 in their order.

    Two weights per load; choosing among 16 constants would take a dozen instructions for each.
    """
    pair = tl.load(table + packed).to(tl.int32)
    values = tl.join(pair & 255, (pair >> 8) & 255).permute(0, 1, 3, 2)
    values = values.reshape(packed.shape[0], packed.shape[1], 2 * packed.shape[2])
    return small_to_float(values, 128)


@jit
def crumbs_tile(p, stride, rows, row_mask, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """2-bit quants of a tile, int32 [BLOCK_N, BLOCK_K // 32, 32].

    Weight 128 h + 32 i + j of a row lies in bits 2 i and 2 i + 1 of byte 32 h + j.
    """
    j = tl.arange(0, 32)
    if BLOCK_K == 64:
        at = p + rows[:, None] * stride + (k0 // 128 * 32 + j)[None, :]
        packed = tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32) >> (k0 // 64 % 2 * 4)
        q = tl.join(packed & 3, packed >> 2 & 3).permute(0, 2, 1)
    else:
        half = k0 // 128 + tl.arange(0, BLOCK_K // 128)
        at = p + rows[:, None, None] * stride + ((half * 32)[:, None] + j[None, :])[None]
        packed = tl.load(at, mask=row_mask[:, None, None], other=0).to(tl.int32)
        first = tl.join(packed & 3, packed >> 2 & 3)
        second = tl.join(packed >> 4 & 3, packed >> 6)
        q = tl.join(first, second).permute(0, 1, 4, 3, 2)
    return q.reshape(BLOCK_N, BLOCK_K // 32, 32)


@jit
def take4(packed, STEP: tl.constexpr, MASK: tl.constexpr):
    """Fields of int32 [BLOCK_N, n], one every STEP bits: int32 [BLOCK_N, 4 n].

    Joined in registers: a shift by an arange would be a shift by a variable.
    """
    even = tl.join(packed & MASK, (packed >> 2 * STEP) & MASK)
    odd = tl.join((packed >> STEP) & MASK, (packed >> 3 * STEP) & MASK)
    return tl.join(even, odd).reshape(packed.shape[0], 4 * packed.shape[1])


@jit
def take8(packed, STEP: tl.constexpr, MASK: tl.constexpr):
    """The same with eight fields: int32 [BLOCK_N, 8 n]."""
    fields = tl.join(take4(packed, STEP, MASK), take4(packed >> 4 * STEP, STEP, MASK))
    fields = fields.reshape(packed.shape[0], packed.shape[1], 4, 2).permute(0, 1, 3, 2)
    return fields.reshape(packed.shape[0], 8 * packed.shape[1])
