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

__all__ = ["coded_words", "lookup", "lookup_ptx"]


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
    lines = [
        "{ .reg .b32 s, c, s1, c1, a, b, l0, h0, l1, h1;",
        "and.b32 s, $4, 0x77777777;",
        # Selectors i or i + 4: the byte of the first eight entries or of the others.
        "shr.u32 c, $4, 1;",
        "lop3.b32 c, c, 0x44444444, 0x32103210, 0xEA;",
        "shr.u32 s1, s, 16;",
        "shr.u32 c1, c, 16;",
    ]
    for byte, name in enumerate("lh"):
        table = bytes(half[byte] for half in halves)
        words = [f"0x{word:08X}" for word in struct.unpack("<4I", table)]
        for half in ("", "1"):
            out = f"{name}{half or 0}"
            if table[:8] == table[8:]:
                lines.append(f"prmt.b32 {out}, {words[0]}, {words[1]}, s{half};")
                continue
            lines.append(f"prmt.b32 a, {words[0]}, {words[1]}, s{half};")
            lines.append(f"prmt.b32 b, {words[2]}, {words[3]}, s{half};")
            lines.append(f"prmt.b32 {out}, a, b, c{half};")
    for output, (half, selector) in enumerate([(0, 0x6240), (1, 0x6240), (0, 0x7351), (1, 0x7351)]):
        lines.append(f"prmt.b32 ${output}, l{half}, h{half}, 0x{selector:04X};")
    return "\n".join([*lines, "}"])


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
