"""The lookup of codes by byte permutations, which no interpreter runs.

Oracle: the values themselves. The instructions are carried out here as the PTX ISA defines them
(``and``, ``shr``, ``lop3``, ``prmt`` in its default mode), for every byte.
"""

from __future__ import annotations

import re
import struct

import pytest

pytest.importorskip("triton")

from oxillama_torch.kernels.formats import iq4_nl, mxfp4  # noqa: E402
from oxillama_torch.kernels.formats.pair_codes import bytes_ptx, lookup_ptx  # noqa: E402


def prmt(a: int, b: int, selector: int) -> int:
    """Bytes of b:a by the four lowest nibbles; the fourth bit copies the sign of a byte."""
    source, out = (b << 32 | a).to_bytes(8, "little"), []
    for place in range(4):
        nibble = selector >> 4 * place & 15
        byte = source[nibble & 7]
        out.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(out), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit i of the table is the result for the bits 4 a + 2 b + c = i."""
    bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
    return sum((table >> index & 1) << i for i, index in enumerate(bits))


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
}


def run(ptx: str, codes: int, outputs: int) -> list[int]:
    """The outputs for one word of codes, the input after them."""
    registers = {f"${outputs}": codes}
    statements = [part.strip() for part in ptx.strip("{} \n").split(";")]
    for statement in filter(None, statements):
        if statement.startswith(".reg"):
            continue
        name, target, *operands = re.split(r"[ ,]+", statement)
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${output}"] for output in range(outputs)]


@pytest.mark.parametrize("values", [iq4_nl.VALUES, mxfp4.VALUES], ids=["iq4", "fp4"])
def test_every_byte_gives_its_values(values):
    ptx = lookup_ptx(values)
    for byte in range(256):
        # Four different bytes, and every byte in every place.
        codes = bytes((byte + step) % 256 for step in (0, 77, 130, 201))
        words = run(ptx, int.from_bytes(codes, "little"), 4)
        low, high = struct.pack("<2I", *words[:2]), struct.pack("<2I", *words[2:])
        for bits, wanted in ((low, [c & 15 for c in codes]), (high, [c >> 4 for c in codes])):
            halves = struct.unpack("<4H", bits)
            got = [struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves]
            assert got == [values[code] for code in wanted]


def test_every_byte_gives_its_int8():
    ptx = bytes_ptx(iq4_nl.VALUES)
    for byte in range(256):
        codes = bytes((byte + step) % 256 for step in (0, 77, 130, 201))
        words = struct.pack("<2I", *run(ptx, int.from_bytes(codes, "little"), 2))
        wanted = [*(c & 15 for c in codes), *(c >> 4 for c in codes)]
        assert list(struct.unpack("<8b", words)) == [iq4_nl.VALUES[code] for code in wanted]
