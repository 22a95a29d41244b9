"""Weights two at a time, as the bfloat16 operands of tensor cores: the pieces of ``decode_pairs``.

A word of 32 bits holds two neighbouring weights. 128 + q is a bfloat16 whose last bits are those
of q, so two bytes below 128 become two numbers by one byte permutation; subtracting 128 is exact,
and a fused multiply-add applies the scales to both. That is a third of the instructions that
float32 would take: no conversion, no multiplication and no rounding of single weights.

Scale and minimum are rounded to bfloat16 first, and the product once more: a weight is off by at
most 2^-7 of ``|scale q| + |minimum|``, where rounding its float32 value would be off by 2^-8.

Interpreted, the same values are computed without the instructions.

Shapes: N rows, G groups that share a scale, W words of two weights.
"""

from __future__ import annotations

from oxillama_torch.kernels.formats.tile import jit, tl

__all__ = [
    "ASM",
    "crumbs",
    "exact",
    "four_each",
    "four_runs",
    "in_order",
    "load_fours",
    "load_half",
    "load_halves",
    "low_and_high",
    "rounded",
    "scaled",
    "scaled_less",
    "sides",
    "signed",
    "twice",
    "two_and_two",
    "two_runs",
]

ASM = None
if tl is not None:
    from triton import knobs

    # Whether to use instructions, which are not interpreted.
    ASM = tl.constexpr(not knobs.runtime.interpret)


@jit
def load_fours(pointer, stride, rows, row_mask, index):
    """Four bytes at a time: int32 [N, G, W / 2]; ``index`` [G, W / 2] counts fours."""
    at = (rows * (stride // 4))[:, None, None] + index[None]
    pointer = pointer.to(tl.pointer_type(tl.int32))
    return tl.load(pointer + at, mask=row_mask[:, None, None], other=0)


@jit
def load_half(pointer, stride, rows, row_mask, index):
    """One float16 per group: float32 [N, G]; ``index`` [G]."""
    at = (rows * stride)[:, None] + index[None, :]
    return tl.load(pointer + at, mask=row_mask[:, None], other=0.0).to(tl.float32)


@jit
def load_halves(pointer, stride, rows, row_mask, index):
    """Two float16 that lie together: two float32 [N, G]; ``index`` [G] counts twos."""
    at = (rows * (stride // 2))[:, None] + index[None, :]
    pointer = pointer.to(tl.pointer_type(tl.int32))
    both = tl.load(pointer + at, mask=row_mask[:, None], other=0)
    first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def exact(fours, OFFSET: tl.constexpr):
    """``byte - OFFSET`` of bytes below 128: int32 [N, G, W / 2] -> words [N, G, W]."""
    # 128 + OFFSET is below 256, hence a bfloat16; bit by bit it is 0x4300 + OFFSET.
    return _fused(_plus_128(fours), _word(0x3F80), _word(0xC300 + OFFSET))


@jit
def scaled(words, scale):
    """``q * scale``: words [N, G, W], scale float32 [N, G]."""
    return _fused(words, twice(scale)[:, :, None], _word(0x8000))


@jit
def scaled_less(words, scale, least):
    """``q * scale - least``: words [N, G, W], scale and least float32 [N, G]."""
    return _fused(words, twice(scale)[:, :, None], twice(-least)[:, :, None])


@jit
def in_order(words):
    """Words [N, ...] in the order of their weights -> bfloat16 [N, weights]."""
    words = words.reshape(words.shape[0], words.numel // words.shape[0])
    low = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(words.shape[0], 2 * words.shape[1])


@jit
def low_and_high(low, high):
    """Words of groups 2 i and 2 i + 1, [N, G, W] each -> bfloat16 [N, 4 G W] in their order."""
    return in_order(tl.join(low, high).permute(0, 1, 3, 2))


@jit
def sides(k0, BLOCK_K: tl.constexpr):
    """Halves of blocks of 256 that a tile touches, cut in two: ``2 half + side``, int32 [G].

    A tile of 64 lies in one half; see ``two_runs``.
    """
    return k0 // 128 * 2 + tl.arange(0, 2 * max(BLOCK_K // 128, 1))


@jit
def four_runs(q0, q1, q2, q3):
    """The four runs of 32 of whole halves, words [N, 2 halves, 8] each -> bfloat16 [N, K]."""
    runs = tl.join(tl.join(q0, q2), tl.join(q1, q3))
    runs = runs.reshape(q0.shape[0], q0.shape[1] // 2, 2, 8, 2, 2)
    return in_order(runs.permute(0, 1, 4, 5, 2, 3))


@jit
def two_runs(q0, q1):
    """Two runs of 32, words [N, 2, 8] each -> bfloat16 [N, 64]."""
    return in_order(tl.join(q0, q1).permute(0, 3, 1, 2))


@jit
def _plus_128(fours):
    """Bytes as the last bits of bfloat16 from 128 on."""
    if ASM:
        first, second = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0x43434343, 0x4140; prmt.b32 $1, $2, 0x43434343, 0x4342;",
            "=r,=r,r", [fours], (tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        first = (fours & 0xFF) | (fours & 0xFF00) << 8 | 0x43004300
        second = (fours >> 16) & 0xFF | (fours >> 8) & 0xFF0000 | 0x43004300
    return two_and_two(first, second)


@jit
def two_and_two(first, second):
    """The first and the second word of each four weights, [N, G, W / 2] each -> [N, G, W]."""
    return tl.join(first, second).reshape(first.shape[0], first.shape[1], 2 * first.shape[2])


@jit
def four_each(a, b, c, d):
    """Four words side by side: int32 [N, G, W] each -> [N, G, 4 W]."""
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return words.reshape(a.shape[0], a.shape[1], 4 * a.shape[2])


@jit
def crumbs(fours, BYTE: tl.constexpr):
    """``q - 1`` of the lower two of the four 2-bit quants of a byte: words [N, G, W]."""
    if ASM:
        select = tl.full((1, 1), 0x4040 + 0x0101 * BYTE, tl.int32)
        both = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0x43434343, $2;", "=r,r,r", [fours, select], tl.int32, True, 1
        )
    else:
        byte = (fours >> 8 * BYTE) & 0xFF
        both = byte | byte << 16 | 0x43004300
    # 128 + q, and 128 + 4 q of the second: its bits stay where they are, and a quarter is taken.
    quarter = tl.full((1, 1), 0x3E803F80, tl.uint32).to(tl.int32, bitcast=True)
    less = tl.full((1, 1), 0xC204C301, tl.uint32).to(tl.int32, bitcast=True)  # 129 and 33
    return _fused(both & -0x00F300FD, quarter, less)


@jit
def signed(bits, minus, FIRST: tl.constexpr):
    """Words ``minus`` with the signs turned that bits FIRST and FIRST + 1 of int32 name."""
    if FIRST < 16:
        low = bits << (15 - FIRST)
    else:
        low = bits >> (FIRST - 15)
    return minus ^ (low & 0x8000 | (bits << (30 - FIRST)) & -0x80000000)


@jit
def _word(HALF: tl.constexpr):
    """Twice the same 16 bits, int32 [1, 1, 1]."""
    return tl.full((1, 1, 1), HALF * 65537, tl.uint32).to(tl.int32, bitcast=True)


@jit
def twice(x):
    """float32 -> words of twice its bfloat16."""
    if ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [x], tl.int32, True, 1
        )
    else:
        half = rounded(x)
        return half | half << 16


@jit
def _fused(a, b, c):
    """``a * b + c`` of both bfloat16 of each word, rounded once."""
    if ASM:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, True, 1
        )
    else:
        low = _float(a << 16) * _float(b << 16) + _float(c << 16)
        high = _float(a) * _float(b) + _float(c)
        return rounded(low) | rounded(high) << 16


@jit
def _float(word):
    """float32 of the upper bfloat16 of each word."""
    return (word & -65536).to(tl.float32, bitcast=True)


@jit
def rounded(x):
    """Bits of the bfloat16 nearest to a float32, half to even: int32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
