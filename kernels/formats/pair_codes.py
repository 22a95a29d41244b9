"""Codes of 4 bits that stand for one of 16 values, two at a time: pieces of ``decode_pairs``.

The byte permutation of a GPU picks four of eight bytes by four selectors of 4 bits each, three bits
of which count. So a table of 16 bytes takes two permutations for four codes, and a third that
chooses between their results by the codes' last bits. Values are looked up as bfloat16 right away,
their two bytes one after the other: nothing is converted.

Interpreted, values come from the table in memory that ``decode_tile`` reads, a
``bits.nibble_table``.

Shapes: as in ``pairs``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from oxillama_torch.kernels.formats.pairs import (
    ASM,
    load_fours,
    low_and_high,
    rounded,
    scaled,
    two_and_two,
)
from oxillama_torch.kernels.formats.tile import jit, tl

__all__ = ["bytes_ptx", "coded_tile", "coded_words", "lookup", "lookup_ptx"]


def lookup(values: Sequence[int]) -> Any:
    """``lookup_ptx`` as a constant for kernels; None without Triton."""
    return None if tl is None else tl.constexpr(lookup_ptx(values))


def lookup_ptx(values: Sequence[int]) -> str:
    """PTX: eight codes -> four words of two bfloat16 each.

    Output 0 has the low nibbles of bytes 0 and 1, output 1 those of bytes 2 and 3, outputs 2 and 3
    the high nibbles likewise; input 4 is the word of codes.

    Args:
        values: 16 integers from -256 to 256, all of them bfloat16.
    """
    halves = [struct.pack("<f", value)[2:] for value in values]
    lines = [*_selectors("$4"), ".reg .b32 l, l1, h, h1;"]
    for byte, name in enumerate("lh"):
        lines += _pick(bytes(half[byte] for half in halves), name)
    lines += ["prmt.b32 $0, l, h, 0x6240;", "prmt.b32 $1, l1, h1, 0x6240;"]
    lines += ["prmt.b32 $2, l, h, 0x7351;", "prmt.b32 $3, l1, h1, 0x7351;"]
    return "\n".join(["{", *lines, "}"])


def bytes_ptx(values: Sequence[int]) -> str:
    """PTX: eight codes -> two words of four int8, of the low nibbles and of the high ones.

    Args:
        values: 16 integers from -128 to 127; input 2 is the word of codes.
    """
    lines = [*_selectors("$2"), ".reg .b32 v, v1;", *_pick(struct.pack("<16b", *values), "v")]
    lines += ["prmt.b32 $0, v, v1, 0x6420;", "prmt.b32 $1, v, v1, 0x7531;"]
    return "\n".join(["{", *lines, "}"])


def _selectors(codes: str) -> list[str]:
    """s: three bits of each of the first four codes; c: i, or i + 4 where code i has its fourth.

    s1 and c1 are the same of the other four codes.
    """
    return [
        ".reg .b32 s, c, s1, c1, a, b;",
        f"and.b32 s, {codes}, 0x77777777;",
        f"shr.u32 c, {codes}, 1;",
        "lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;",
        "shr.u32 s1, s, 16;",
        "shr.u32 c1, c, 16;",
    ]


def _pick(table: bytes, name: str) -> list[str]:
    """Bytes of a table of 16: ``name`` by the first four codes, ``name1`` by the others."""
    words = [f"0x{word:08X}" for word in struct.unpack("<4I", table)]
    lines = []
    for which in ("", "1"):
        if table[:8] == table[8:]:
            lines.append(f"prmt.b32 {name}{which}, {words[0]}, {words[1]}, s{which};")
        else:
            lines.append(f"prmt.b32 a, {words[0]}, {words[1]}, s{which};")
            lines.append(f"prmt.b32 b, {words[2]}, {words[3]}, s{which};")
            lines.append(f"prmt.b32 {name}{which}, a, b, c{which};")
    return lines


@jit
def coded_words(fours, table, PTX: tl.constexpr):
    """Values of codes: int32 [N, G, W / 2] -> words [N, G, W] of low nibbles, and of high ones."""
    if ASM:
        low0, low1, high0, high1 = tl.inline_asm_elementwise(
            PTX, "=r,=r,=r,=r,r", [fours], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
    else:
        low0, high0 = _two_bytes(fours, table)
        low1, high1 = _two_bytes(fours >> 16, table)
    return two_and_two(low0, low1), two_and_two(high0, high1)


@jit
def _two_bytes(twos, table):
    """Words of the low and of the high nibbles of the first two bytes."""
    first = tl.load(table + (twos & 255)).to(tl.int32)
    second = tl.load(table + (twos >> 8 & 255)).to(tl.int32)
    low = _half(first & 255) | _half(second & 255) << 16
    return low, _half(first >> 8 & 255) | _half(second >> 8 & 255) << 16


@jit
def _half(biased):
    """Bits of the bfloat16 ``biased - 128``."""
    return rounded((biased - 128).to(tl.float32))


@jit
def coded_tile(qs, stride, rows, row_mask, first_word, scale, table, PTX: tl.constexpr):
    """Weights of groups that keep their first half in low nibbles, the second in high ones.

    Args:
        qs, stride: plane of codes; first_word [G, W / 2]: fours of each group.
        scale: float32 [N, G].
    """
    low, high = coded_words(load_fours(qs, stride, rows, row_mask, first_word), table, PTX)
    return low_and_high(scaled(low, scale), scaled(high, scale))
