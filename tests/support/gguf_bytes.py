"""GGUF files put together by hand, field by field, so that any field can be wrong.

Written from the specification (docs/gguf.md of ggml), not from our reader.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL = range(8)
STRING, ARRAY, UINT64, INT64, FLOAT64 = range(8, 13)
F32, Q4_0, Q8_0 = 0, 2, 8


@dataclass
class File:
    """A GGUF file. ``num_tensors`` and ``num_keys`` may lie; None says the truth."""

    version: int = 3
    keys: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    num_tensors: int | None = None
    num_keys: int | None = None
    alignment: int = 32

    def size(self, value: int) -> bytes:
        """A count or length: 32 bits in version 1, 64 bits later."""
        return struct.pack("<I" if self.version == 1 else "<Q", value)

    def string(self, text: str | bytes, length: int | None = None) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return self.size(len(raw) if length is None else length) + raw

    def key(self, name: str | bytes, type: int, payload: bytes) -> File:
        self.keys.append(self.string(name) + struct.pack("<I", type) + payload)
        return self

    def uint32(self, name: str, value: int) -> File:
        return self.key(name, UINT32, struct.pack("<I", value))

    def array(self, type: int, count: int, payload: bytes = b"") -> bytes:
        return struct.pack("<I", type) + self.size(count) + payload

    def tensor(
        self,
        name: str | bytes,
        dims: list[int],
        type: int = F32,
        offset: int = 0,
        num_dims: int | None = None,
    ) -> File:
        """Dims in the order of the file, the row length first."""
        num_dims = len(dims) if num_dims is None else num_dims
        self.tensors.append(
            self.string(name)
            + struct.pack("<I", num_dims)
            + b"".join(map(self.size, dims))
            + struct.pack("<IQ", type, offset)
        )
        return self

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        counts = struct.pack("<I", self.version) + self.size(num_tensors) + self.size(num_keys)
        return self.magic + counts + b"".join(self.keys + self.tensors)

    def build(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def every_type(version: int = 3) -> File:
    """A valid file with a key of each value type and three tensors."""
    file = File(version)
    file.key("general.architecture", STRING, file.string("llama"))
    file.key("a.u8", UINT8, b"\xfe").key("a.i8", INT8, b"\xfe")
    file.key("a.u16", UINT16, struct.pack("<H", 65535)).key("a.i16", INT16, struct.pack("<h", -2))
    file.uint32("a.u32", 1 << 31).key("a.i32", INT32, struct.pack("<i", -3))
    file.key("a.f32", FLOAT32, struct.pack("<f", 1.5)).key("a.bool", BOOL, b"\1")
    file.key("a.u64", UINT64, struct.pack("<Q", 1 << 63)).key("a.i64", INT64, struct.pack("<q", -4))
    file.key("a.f64", FLOAT64, struct.pack("<d", 0.1)).key("a.text", STRING, file.string("héllo"))
    words = b"".join(map(file.string, ["", "a\0b", "é"]))
    file.key("a.words", ARRAY, file.array(STRING, 3, words))
    file.key("a.floats", ARRAY, file.array(FLOAT32, 2, struct.pack("<2f", 0.5, -1)))
    file.key("a.bools", ARRAY, file.array(BOOL, 2, b"\1\0"))
    file.key("a.empty", ARRAY, file.array(INT32, 0))
    nested = file.array(INT16, 2, struct.pack("<2h", 1, -1)) + file.array(
        STRING, 1, file.string("x")
    )
    file.key("a.nested", ARRAY, file.array(ARRAY, 2, nested))
    file.tensor("matrix.weight", [4, 3], F32, 0)
    file.tensor("packed.weight", [64, 2], Q4_0, 64)
    file.tensor("vector", [5], F32, 160)
    matrix = struct.pack("<12f", *range(12)).ljust(64, b"\0")
    file.data = matrix + bytes(range(72)).ljust(96, b"\0") + struct.pack("<5f", *range(5))
    return file
