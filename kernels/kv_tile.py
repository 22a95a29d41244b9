"""Device functions that read and write keys and values in pages, packed ones inside the tile.

``KV`` says how they lie there: "plain" in the pages' own dtype, "fp8", "q8_0" or "q4_0" as bytes,
see ``kv_formats``. float8 is taken apart by bit arithmetic: GPUs without it serve it as well.

Shapes: N slots, DIM head dim, BLOCK DIM rounded up to a power of two, G = BLOCK / 32 groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oxillama_torch.kernels.kv_formats import format_of

__all__ = ["kv_kind", "load_tile", "store_head"]


def kv_kind(pages: torch.Tensor, dim: int) -> str:
    """``KV`` for pages of heads of ``dim`` dims."""
    name = format_of(pages, dim).name
    return name if pages.dtype.itemsize == 1 else "plain"


@triton.jit
def _load(at, inside, in_row, WHOLE: tl.constexpr, MASKED: tl.constexpr):
    """[N, columns] at ``at``; zeros for slots outside and past the end of a row."""
    if MASKED:
        return tl.load(at, mask=inside[:, None] & in_row[None, :], other=0)
    elif WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=in_row[None, :], other=0)


@triton.jit
def _from_fp8(byte):
    """float8_e4m3fn as float32: its bits are those of a float16 that is 256 times smaller."""
    half = ((byte.to(tl.int16) << 8) >> 1) & -0x4001  # the shift doubles the sign; once is enough
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _to_fp8(x):
    """float32 as float8_e4m3fn, to the nearest, halves to even; beyond +-448 cut to that."""
    size = tl.abs(x)
    cut = tl.where(size < 448.0, size, 448.0)
    bits = cut.to(tl.int32, bitcast=True)
    # A float32's exponent is 120 more than a float8's; 20 bits of its mantissa are rounded off.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9, which is what the last bit of a float32 near 2^14 is worth.
    small = (cut + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    byte = tl.where(cut < 0.015625, small, normal)
    byte = tl.where(x != x, 0x7F, byte)
    return (byte | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _load_scales(row, inside, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Scales at ``row`` [N], one for 32 dims, spread over them: float32 [N, BLOCK]."""
    g = tl.arange(0, BLOCK // 32)
    at = row.to(tl.pointer_type(tl.float16))[:, None] + g[None, :]
    scale = _load(at, inside, g < DIM // 32, DIM == BLOCK, MASKED).to(tl.float32)
    spread = tl.broadcast_to(scale[:, :, None], (row.shape[0], BLOCK // 32, 32))
    return tl.reshape(spread, (row.shape[0], BLOCK))


@triton.jit
def load_tile(
    pages, slot, kv_head, inside,
    HKV: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    KV: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys or values of one head in the slots [N]: [N, BLOCK] in DTYPE, zero from DIM on."""
    head = slot * HKV + kv_head
    d = tl.arange(0, BLOCK)
    if KV == "q8_0":
        row = pages + head * (DIM // 32 * 34)
        values = _load(row[:, None] + d[None, :], inside, d < DIM, DIM == BLOCK, MASKED)
        scale = _load_scales(row + DIM, inside, DIM, BLOCK, MASKED)
        tile = values.to(tl.int8, bitcast=True).to(tl.float32) * scale
    elif KV == "q4_0":
        row = pages + head * (DIM // 32 * 18)
        b = tl.arange(0, BLOCK // 2)
        pair = _load(row[:, None] + b[None, :], inside, b < DIM // 2, DIM == BLOCK, MASKED)
        q = tl.interleave(pair & 15, pair >> 4).to(tl.float32) - 8.0
        tile = q * _load_scales(row + DIM // 2, inside, DIM, BLOCK, MASKED)
    else:
        at = pages + head[:, None] * DIM + d[None, :]
        tile = _load(at, inside, d < DIM, DIM == BLOCK, MASKED)
        if KV == "fp8":
            tile = _from_fp8(tile)
    return tile.to(DTYPE)


@triton.jit
def store_head(row, x, DIM: tl.constexpr, BLOCK: tl.constexpr, KV: tl.constexpr):
    """Write a head x, float32 [BLOCK] and zero from DIM on, as "fp8", "q8_0" or "q4_0"."""
    d = tl.arange(0, BLOCK)
    if KV == "fp8":
        tl.store(row + d, _to_fp8(x), mask=d < DIM)
        return
    i = tl.arange(0, 32)
    groups = tl.reshape(x, (BLOCK // 32, 32))
    # As integers, sizes have their order, and NaN is the largest.
    size = tl.abs(groups).to(tl.int32, bitcast=True)
    top = tl.max(size, axis=1)
    if KV == "q8_0":
        scale = tl.div_rn(top.to(tl.float32, bitcast=True), tl.full(top.shape, 127.0, tl.float32))
    else:
        first = tl.min(tl.where(size == top[:, None], i[None, :], 32), axis=1)
        scale = tl.sum(tl.where(i[None, :] == first[:, None], groups, 0.0), axis=1) / -8.0
    empty = scale == 0.0
    one = tl.full(top.shape, 1.0, tl.float32)
    inverse = tl.where(empty, 0.0, tl.div_rn(one, tl.where(empty, 1.0, scale)))
    y = groups * inverse[:, None]
    if KV == "q8_0":
        whole = tl.floor(tl.abs(y))
        rounded = whole + tl.floor(2.0 * (tl.abs(y) - whole))
        q = tl.where(y < 0.0, -rounded, rounded).to(tl.int32).to(tl.uint8)
        tl.store(row + d, tl.reshape(q, (BLOCK,)), mask=d < DIM)
    else:
        q = tl.minimum((y + 8.5).to(tl.int32), 15).to(tl.uint8)
        low, high = tl.split(tl.reshape(q, (BLOCK // 2, 2)))
        b = tl.arange(0, BLOCK // 2)
        tl.store(row + b, low | (high << 4), mask=b < DIM // 2)
    g = tl.arange(0, BLOCK // 32)
    values: tl.constexpr = DIM if KV == "q8_0" else DIM // 2
    scales = (row + values).to(tl.pointer_type(tl.float16))
    tl.store(scales + g, scale.to(tl.float16), mask=g < DIM // 32)
