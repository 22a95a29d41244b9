"""Integer products of packed weights with 8-bit activations, one function per format.

A *unit* is the weights that one thread takes at a time: those in 16 or 32 bytes of quants. Quants
are read 16 bytes at a time, the widest load there is: four words of 32 bits, each of which becomes
four int8 per group. A function returns what the units of a tile add to the outputs::

    unit(p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM)
        -> float32 [BLOCK_N, BLOCK_U]

    p0..p3, s0..s3      planes and their row strides in elements, as for ``decode_tile``
    n, u                int64 [BLOCK_N] rows of W; int32 [BLOCK_U] units of a row
    mask                bool [BLOCK_N, BLOCK_U]
    x                   int8 [K], one row of quantized activations; x_scales, x_sums its float32
                        scale and sum per 32 (see ``triton_quantize``)
    x_mask              bool [BLOCK_U]
    USE_ASM             whether to use the ``dp4a`` instruction, which is not interpreted

The formats' files hold their layouts. In the comments, ``dot`` is the integer sum of q * x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from oxillama_torch.kernels.formats.iq4_nl import VALUES
from oxillama_torch.kernels.formats.pair_codes import bytes_ptx

__all__ = ["UNITS"]

IQ4_BYTES = tl.constexpr(bytes_ptx(VALUES))


@triton.jit
def dp4a(a, b, USE_ASM: tl.constexpr):
    """Sum of the products of four int8 in ``a`` with the four in ``b``, elementwise on int32."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total = ((a << 24) >> 24) * ((b << 24) >> 24)
        total += ((a << 16) >> 24) * ((b << 16) >> 24)
        total += ((a << 8) >> 24) * ((b << 8) >> 24)
        return total + (a >> 24) * (b >> 24)


@triton.jit
def w_words(pointer, stride, n, word, mask):
    """Four words from ``word`` on of rows n: int32 [BLOCK_N, BLOCK_U, 4]; the stride in bytes."""
    at = (n * (stride // 4))[:, None, None] + word[None, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.load(pointer.to(tl.pointer_type(tl.int32)) + at, mask=mask[:, :, None], other=0)


@triton.jit
def x_words(x, word, x_mask):
    """Four words of the activations from ``word`` on: int32 [1, BLOCK_U, 4]."""
    at = word[None, :, None] + tl.arange(0, 4)[None, None, :]
    return tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=x_mask[None, :, None], other=0)


@triton.jit
def dot16(w, x, USE_ASM: tl.constexpr):
    """int32 [BLOCK_N, BLOCK_U]: products of 16 quants with 16 activations, added up."""
    return tl.sum(dp4a(w, tl.broadcast_to(x, w.shape), USE_ASM), axis=2)


@triton.jit
def x_factor(pointer, group, x_mask):
    """A scale or sum of the activations: float32 [1, BLOCK_U]."""
    return tl.load(pointer + group, mask=x_mask, other=0.0)[None, :]


@triton.jit
def half_at(pointer, stride, n, index, mask):
    """One float16 per unit: float32 [BLOCK_N, BLOCK_U]."""
    at = (n * stride)[:, None] + index[None, :]
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def halves_at(pointer, stride, n, index, mask):
    """Two float16 that lie together, in one load; ``index`` counts pairs."""
    at = (n * (stride // 2))[:, None] + index[None, :]
    both = tl.load(pointer.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
    first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def fifth_bits(bits):
    """Bits 0 to 3, one to each byte of a word, as bit 4 there."""
    return (bits & 15) * 0x02040810 & 0x10101010


@triton.jit
def block32(w, high_bits, x, u, x_mask, HAS_HIGH: tl.constexpr, USE_ASM: tl.constexpr):
    """dot of blocks of 32 whose byte j holds weights j and j + 16, with a fifth bit or without."""
    low, high = w & 0x0F0F0F0F, (w >> 4) & 0x0F0F0F0F
    if HAS_HIGH:
        word = tl.arange(0, 4)[None, None, :]
        low |= fifth_bits(high_bits[:, :, None] >> (word * 4))
        high |= fifth_bits(high_bits[:, :, None] >> (word * 4 + 16))
    dot = dot16(low, x_words(x, u * 8, x_mask), USE_ASM)
    return (dot + dot16(high, x_words(x, u * 8 + 4, x_mask), USE_ASM)).to(tl.float32)


@triton.jit
def q4_0(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, d: ``d * (dot - 8 * sum)``."""
    dot = block32(w_words(p0, s0, n, u * 4, mask), 0, x, u, x_mask, False, USE_ASM)
    dot = dot * x_factor(x_scales, u, x_mask) - 8.0 * x_factor(x_sums, u, x_mask)
    return dot * half_at(p1, s1, n, u, mask)


@triton.jit
def q4_1(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, (d, m): ``d * dot + m * sum``."""
    dot = block32(w_words(p0, s0, n, u * 4, mask), 0, x, u, x_mask, False, USE_ASM)
    d, m = halves_at(p1, s1, n, u, mask)
    return d * (dot * x_factor(x_scales, u, x_mask)) + m * x_factor(x_sums, u, x_mask)


@triton.jit
def q5_0(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, qh, d: ``d * (dot - 16 * sum)``."""
    high = tl.load(p1 + (n * s1)[:, None] + u[None, :], mask=mask, other=0)
    dot = block32(w_words(p0, s0, n, u * 4, mask), high, x, u, x_mask, True, USE_ASM)
    dot = dot * x_factor(x_scales, u, x_mask) - 16.0 * x_factor(x_sums, u, x_mask)
    return dot * half_at(p2, s2, n, u, mask)


@triton.jit
def q5_1(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, qh, (d, m): ``d * dot + m * sum``."""
    high = tl.load(p1 + (n * s1)[:, None] + u[None, :], mask=mask, other=0)
    dot = block32(w_words(p0, s0, n, u * 4, mask), high, x, u, x_mask, True, USE_ASM)
    d, m = halves_at(p2, s2, n, u, mask)
    return d * (dot * x_factor(x_scales, u, x_mask)) + m * x_factor(x_sums, u, x_mask)


@triton.jit
def q8_0(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, d: ``d * dot``."""
    dot = dot16(w_words(p0, s0, n, u * 8, mask), x_words(x, u * 8, x_mask), USE_ASM)
    dot += dot16(w_words(p0, s0, n, u * 8 + 4, mask), x_words(x, u * 8 + 4, x_mask), USE_ASM)
    return dot.to(tl.float32) * (half_at(p1, s1, n, u, mask) * x_factor(x_scales, u, x_mask))


@triton.jit
def scaled_pair(dot0, dot1, p_scales, p_dm, s_scales, s_dm, n, u, mask, x_scales, x_sums, x_mask):
    """Scales and minima of Q4_K and Q5_K, applied to the dots of groups 2 u and 2 u + 1.

    ``d * (sc0 * dot0 + sc1 * dot1) - dmin * (m0 * sum0 + m1 * sum1)``
    """
    at = (n * (s_scales // 2))[:, None] + (u // 4 * 8 + u % 4)[None, :]
    # Two scales, bytes below 64, in one load; their minima are 8 bytes on.
    pair = p_scales.to(tl.pointer_type(tl.int16)) + at
    sc = tl.load(pair, mask=mask, other=0).to(tl.int32)
    m = tl.load(pair + 4, mask=mask, other=0).to(tl.int32)
    d, dmin = halves_at(p_dm, s_dm, n, u // 4, mask)
    dots = dot0.to(tl.float32) * x_factor(x_scales, u * 2, x_mask) * (sc & 0xFF).to(tl.float32)
    dots += dot1.to(tl.float32) * x_factor(x_scales, u * 2 + 1, x_mask) * (sc >> 8).to(tl.float32)
    mins = x_factor(x_sums, u * 2, x_mask) * (m & 0xFF).to(tl.float32)
    mins += x_factor(x_sums, u * 2 + 1, x_mask) * (m >> 8).to(tl.float32)
    return d * dots - dmin * mins


@triton.jit
def q4_k(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, scales, (d, dmin). 32 bytes: the low and high nibbles of two groups."""
    dot0, dot1 = 0, 0
    for half in tl.static_range(2):
        w = w_words(p0, s0, n, u * 8 + half * 4, mask)
        low = x_words(x, u * 16 + half * 4, x_mask)
        high = x_words(x, u * 16 + half * 4 + 8, x_mask)
        dot0 += dot16(w & 0x0F0F0F0F, low, USE_ASM)
        dot1 += dot16((w >> 4) & 0x0F0F0F0F, high, USE_ASM)
    return scaled_pair(dot0, dot1, p1, p2, s1, s2, n, u, mask, x_scales, x_sums, x_mask)


@triton.jit
def q5_k(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, qh, scales, (d, dmin). As Q4_K; pair i of a block has bits 2 i, 2 i + 1 of qh."""
    dot0, dot1 = 0, 0
    for half in tl.static_range(2):
        w = w_words(p0, s0, n, u * 8 + half * 4, mask)
        bits = w_words(p1, s1, n, u // 4 * 8 + half * 4, mask) >> (u % 4 * 2)[None, :, None]
        low = x_words(x, u * 16 + half * 4, x_mask)
        high = x_words(x, u * 16 + half * 4 + 8, x_mask)
        dot0 += dot16(w & 0x0F0F0F0F | (bits << 4) & 0x10101010, low, USE_ASM)
        dot1 += dot16((w >> 4) & 0x0F0F0F0F | (bits << 3) & 0x10101010, high, USE_ASM)
    return scaled_pair(dot0, dot1, p2, p3, s2, s3, n, u, mask, x_scales, x_sums, x_mask)


@triton.jit
def q6_k(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes ql, qh, scales, d: ``d * sc * (dot - 32 * sum)`` per group of 16.

    Units 2 h and 2 h + 1 take the two halves of each of the four groups of 32 in h, half a block.
    """
    h, side = u // 2, u % 2
    a = w_words(p0, s0, n, h * 16 + side * 4, mask)
    b = w_words(p0, s0, n, h * 16 + side * 4 + 8, mask)
    c = w_words(p1, s1, n, h * 8 + side * 4, mask)
    # Eight scales in two loads; this side's are every other byte.
    scales0, scales1 = scales_of_side(p2, s2, n, h, side, mask)
    total = 0.0
    for i in tl.static_range(4):
        low = a if i % 2 == 0 else b
        if i >= 2:
            low = low >> 4
        high = c << 4 - 2 * i if i < 2 else c >> 2 * i - 4
        activations = x_words(x, h * 32 + i * 8 + side * 4, x_mask)
        dot = dot16(low & 0x0F0F0F0F | high & 0x30303030, activations, USE_ASM)
        # 32 times the sum of these 16 activations: sums are kept per 32 only.
        dot -= dot16(tl.full(activations.shape, 0x20202020, tl.int32), activations, USE_ASM)
        sc = ((scales0 if i < 2 else scales1) >> 16 * (i % 2)).to(tl.int8).to(tl.float32)
        total += dot.to(tl.float32) * x_factor(x_scales, h * 4 + i, x_mask) * sc
    return total * half_at(p3, s3, n, u // 4, mask)


@triton.jit
def sum16(x, USE_ASM: tl.constexpr):
    """Sums of 16 activations, int32 [1, BLOCK_U]: those that come with them are per 32."""
    return dot16(tl.full(x.shape, 0x01010101, tl.int32), x, USE_ASM)


@triton.jit
def scales_of_side(scales, stride, n, h, side, mask):
    """Eight bytes in two loads, int32 [BLOCK_N, BLOCK_U]: this side's are in bits 0 and 16 on."""
    at = scales.to(tl.pointer_type(tl.int32)) + (n * (stride // 4))[:, None] + (h * 2)[None, :]
    shift = (side * 8)[None, :]
    return tl.load(at, mask=mask, other=0) >> shift, tl.load(at + 1, mask=mask, other=0) >> shift


@triton.jit
def q2_k(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, scales, (d, dmin): ``d * sc * dot - dmin * m * sum`` per group of 16.

    Units 2 h and 2 h + 1 take the two halves of each of the four groups of 32 in h, half a block.
    """
    h, side = u // 2, u % 2
    w = w_words(p0, s0, n, u * 4, mask)
    scales0, scales1 = scales_of_side(p1, s1, n, h, side, mask)
    dots, mins = 0.0, 0.0
    for i in tl.static_range(4):
        activations = x_words(x, h * 32 + i * 8 + side * 4, x_mask)
        factor = x_factor(x_scales, h * 4 + i, x_mask)
        packed = (scales0 if i < 2 else scales1) >> 16 * (i % 2)
        dot = dot16((w >> 2 * i) & 0x03030303, activations, USE_ASM).to(tl.float32)
        dots += dot * factor * (packed & 15).to(tl.float32)
        total = sum16(activations, USE_ASM).to(tl.float32) * factor
        mins += total * (packed >> 4 & 15).to(tl.float32)
    d, dmin = halves_at(p2, s2, n, u // 4, mask)
    return d * dots - dmin * mins


@triton.jit
def q3_k(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, hmask, scales, d: ``d * sc * (dot - 4 * sum)`` per group of 16; units as Q2_K."""
    h, side = u // 2, u % 2
    w = w_words(p0, s0, n, u * 4, mask)
    high = w_words(p1, s1, n, u // 4 * 8 + side * 4, mask) >> (h % 2 * 4)[None, :, None]
    scales0, scales1 = scales_of_side(p2, s2, n, h, side, mask)
    total = 0.0
    for i in tl.static_range(4):
        activations = x_words(x, h * 32 + i * 8 + side * 4, x_mask)
        q = (w >> 2 * i) & 0x03030303 | (high << 2 >> i) & 0x04040404
        dot = dot16(q, activations, USE_ASM) - 4 * sum16(activations, USE_ASM)
        sc = ((scales0 if i < 2 else scales1) >> 16 * (i % 2)).to(tl.int8).to(tl.float32)
        total += dot.to(tl.float32) * x_factor(x_scales, h * 4 + i, x_mask) * sc
    return total * half_at(p3, s3, n, u // 4, mask)


@triton.jit
def coded_block32(w, table, x, u, x_mask, PTX: tl.constexpr, USE_ASM: tl.constexpr):
    """``block32`` of codes that stand for int8, by ``pair_codes``; interpreted, by the table."""
    if USE_ASM:
        low, high = tl.inline_asm_elementwise(
            PTX, "=r,=r,r", [w], (tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        low, high = tl.zeros_like(w), tl.zeros_like(w)
        for byte in tl.static_range(4):
            pair = tl.load(table + (w >> 8 * byte & 255)).to(tl.int32)
            low |= (pair - 128 & 255) << 8 * byte
            high |= ((pair >> 8) - 128 & 255) << 8 * byte
    dot = dot16(low, x_words(x, u * 8, x_mask), USE_ASM)
    return (dot + dot16(high, x_words(x, u * 8 + 4, x_mask), USE_ASM)).to(tl.float32)


@triton.jit
def iq4_nl(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, d, then the table: ``d * dot``."""
    w = w_words(p0, s0, n, u * 4, mask)
    dot = coded_block32(w, p3, x, u, x_mask, IQ4_BYTES, USE_ASM)
    return dot * (half_at(p1, s1, n, u, mask) * x_factor(x_scales, u, x_mask))


@triton.jit
def iq4_xs(
    p0, p1, p2, p3, s0, s1, s2, s3, n, u, mask, x, x_scales, x_sums, x_mask, USE_ASM: tl.constexpr
):
    """Planes qs, scales, d, then the table: ``d * sc * dot``."""
    w = w_words(p0, s0, n, u * 4, mask)
    dot = coded_block32(w, p3, x, u, x_mask, IQ4_BYTES, USE_ASM)
    sc = tl.load(p1 + (n * s1)[:, None] + u[None, :], mask=mask, other=0).to(tl.float32)
    return dot * (half_at(p2, s2, n, u // 8, mask) * sc * x_factor(x_scales, u, x_mask))


# GGML type -> (function, weights per unit).
UNITS = {
    "Q4_0": (q4_0, 32),
    "Q4_1": (q4_1, 32),
    "Q5_0": (q5_0, 32),
    "Q5_1": (q5_1, 32),
    "Q8_0": (q8_0, 32),
    "Q4_K": (q4_k, 64),
    "Q5_K": (q5_k, 64),
    "Q6_K": (q6_k, 64),
    "Q2_K": (q2_k, 64),
    "Q3_K": (q3_k, 64),
    "IQ4_NL": (iq4_nl, 32),
    "IQ4_XS": (iq4_xs, 32),
}
