"""Parse the header of one GGUF file from untrusted bytes.

Every count, length and offset is checked against the bytes that are there before anything is
allocated for it, so a hostile file costs at most a small multiple of its own size. The first
thing that is wrong raises ``GGUFError`` with the key or tensor concerned and the byte offset.

Header, little-endian, all versions (source: docs/gguf.md and gguf.cpp of ggml)::

    "GGUF"  version u32  n_tensors SIZE  n_keys SIZE
    n_keys    x  key STRING, value type u32, value
    n_tensors x  name STRING, n_dims u32, dims SIZE [n_dims], type u32, offset u64
    padding to ``general.alignment``, then the tensor data that the offsets count from

STRING is a SIZE and that many bytes of UTF-8; an array is element type u32, count SIZE, elements.
SIZE is u32 in version 1 and u64 from version 2. Version 3 added big-endian
files, which are refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType

__all__ = ["Header", "RawTensor", "parse_header"]

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 30
# Far above any real file; they bound the time and the Python objects a hostile one can cost.
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 21
MAX_NESTED_ARRAYS = 1 << 16
MAX_NESTING = 4
# From the GGUF specification.
MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 64
MAX_DIMS = 4

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_DTYPES = {id: np.dtype(code) for id, code in _SCALARS.items()}
_UINT32 = 4
_REMOVED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor of one file.

    Args:
        shape: row-major, as torch has it: the file's dimensions reversed.
        offset: first byte, counted from the start of the file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensor data of one file.

    Args:
        entries: key -> (first byte, byte behind the last) of its name, type and value.
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, RawTensor]
    entries: dict[str, tuple[int, int]]


def parse_header(data: Any, path: str | None = None, *, type_39_is_q1_0: bool = False) -> Header:
    """Parse a GGUF file.

    Args:
        data: the whole file: bytes or an mmap. Numeric arrays of the result are views of it.
        path: for messages.
        type_39_is_q1_0: read tensor type 39, which is MXFP4, as Q1_0; see ``read_gguf``.

    Raises:
        GGUFError: the file is malformed, big-endian or of an unknown version.
    """
    return _Parser(data, path, type_39_is_q1_0).header()


class _Parser:
    def __init__(self, data: Any, path: str | None, type_39_is_q1_0: bool) -> None:
        self.data, self.path = data, path
        self.type_39 = GGMLType.Q1_0 if type_39_is_q1_0 else GGMLType.MXFP4
        self.at, self.size = 0, len(data)
        self.width = 8  # bytes of a count or length
        self.about: str | None = None  # the key or tensor being read, for messages
        self.strings_left, self.arrays_left = MAX_STRINGS, MAX_NESTED_ARRAYS

    def fail(self, message: str, expected: str | None = None, at: int | None = None) -> NoReturn:
        raise GGUFError(
            message,
            path=self.path,
            tensor=self.about,
            offset=self.at if at is None else at,
            expected=expected,
        )

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes; return where they start."""
        start = self.at
        if count > self.size - start:
            self.fail(f"file ends inside {what}", f"{count} bytes, {self.size - start} are left")
        self.at = start + count
        return start

    def u32(self, what: str) -> int:
        return struct.unpack_from("<I", self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack_from("<Q", self.data, self.take(8, what))[0]

    def size_field(self, what: str) -> int:
        """A count or length."""
        return self.u64(what) if self.width == 8 else self.u32(what)

    def string(self, what: str, max_bytes: int | None = None) -> str:
        start = self.at
        count = self.size_field(f"the length of {what}")
        if max_bytes is not None and count > max_bytes:
            self.fail(f"{what} of {count} bytes", f"at most {max_bytes}", start)
        start = self.take(count, what)
        try:
            return bytes(self.data[start : self.at]).decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not valid UTF-8", at=start + error.start)

    def name(self, what: str, max_bytes: int, taken: dict) -> str:
        """A key or tensor name: not empty, no NUL, not taken."""
        start = self.at
        name = self.string(what, max_bytes)
        if not name or "\0" in name:
            self.fail(f"{what} {name!r}", "a name without NUL characters", start)
        self.about = name
        if name in taken:
            self.fail(f"{what} occurs twice", at=start)
        return name

    def header(self) -> Header:
        version = self.preamble()
        self.width = width = 4 if version == 1 else 8
        # The smallest tensor entry: empty name, one dimension. The smallest key: empty, one byte.
        num_tensors = self.count("tensors", 2 * width + 16, MAX_TENSORS)
        num_keys = self.count("keys", width + 5, MAX_KEYS)
        metadata: dict[str, Any] = {}
        entries: dict[str, tuple[int, int]] = {}
        alignment = DEFAULT_ALIGNMENT
        for _ in range(num_keys):
            self.about, entry = None, self.at
            key = self.name("metadata key", MAX_KEY_BYTES, metadata)
            start = self.at
            type = self.u32("a value type")
            metadata[key] = self.value(type, 0)
            entries[key] = (entry, self.at)
            if key == "general.alignment":
                alignment = self.check_alignment(type, metadata[key], start)
        raw: dict[str, RawTensor] = {}
        for _ in range(num_tensors):
            self.about = None
            name = self.name("tensor name", MAX_NAME_BYTES, raw)
            raw[name] = self.tensor(name, alignment)
        return Header(version, metadata, self.place(raw, alignment), entries)

    def preamble(self) -> int:
        start = self.take(4, "the magic number")
        magic = bytes(self.data[start : self.at])
        if magic != MAGIC:
            self.fail(f"not a GGUF file: it starts with {magic!r}", repr(MAGIC), start)
        version = self.u32("the version")
        if version and not version & 0xFFFF:
            self.fail("a big-endian GGUF file", "little-endian", 4)
        if version not in (1, 2, 3):
            self.fail(f"GGUF version {version}", "1, 2 or 3", 4)
        return version

    def count(self, what: str, smallest: int, limit: int) -> int:
        start = self.at
        count = self.size_field(f"the number of {what}")
        # Both counts stand before the first entry, so what is left is an upper bound for either.
        most = min(limit, (self.size - self.at) // smallest)
        if count > most:
            self.fail(f"{count} {what}", f"at most {most} in a file of this size", start)
        return count

    def value(self, type: int, depth: int) -> Any:
        if type == _STRING:
            return self.string("a string")
        if type == _ARRAY:
            return self.array(depth)
        dtype = _DTYPES.get(type)
        if dtype is None:
            self.fail(f"value type {type}", "0 to 12", self.at - 4)
        start = self.take(dtype.itemsize, "a value")
        value = np.frombuffer(self.data, dtype, 1, start)[0].item()
        if type != _BOOL:
            return value
        if value > 1:
            self.fail(f"bool {value}", "0 or 1", start)
        return bool(value)

    def array(self, depth: int) -> list | np.ndarray:
        start = self.at
        if depth >= MAX_NESTING:
            self.fail(f"arrays nested more than {MAX_NESTING} deep")
        type = self.u32("an array's element type")
        count = self.size_field("an array's length")
        if type in _DTYPES:
            return self.numbers(type, count)
        if type == _STRING:
            self.strings_left -= count
            if self.strings_left < 0:
                self.fail(f"array of {count} strings", f"at most {MAX_STRINGS} in all", start)
            return self.strings(count)
        if type != _ARRAY:
            self.fail(f"array of value type {type}", "0 to 12", start)
        self.arrays_left -= count
        if self.arrays_left < 0:
            self.fail(f"array of {count} arrays", f"at most {MAX_NESTED_ARRAYS} in all", start)
        return [self.array(depth + 1) for _ in range(count)]

    def numbers(self, type: int, count: int) -> np.ndarray:
        dtype = _DTYPES[type]
        start = self.take(count * dtype.itemsize, f"an array of {count} numbers")
        values = np.frombuffer(self.data, dtype, count, start)
        values.flags.writeable = False
        if type != _BOOL:
            return values
        if count and values.max() > 1:
            self.fail("array of bools with other bytes than 0 and 1", at=start)
        return values.view(np.bool_)

    def strings(self, count: int) -> list[str]:
        # A vocabulary has 150,000 of these: one loop over local names, no call per string.
        data, at, end = self.data, self.at, self.size
        width = self.width
        unpack = struct.Struct("<Q" if width == 8 else "<I").unpack_from
        if count > (end - at) // width:
            self.fail(f"file ends inside an array of {count} strings")
        values = []
        try:
            for _ in range(count):
                start = at + width
                at = start + unpack(data, at)[0]
                if at > end:
                    self.fail(f"file ends inside string {len(values)} of an array", at=start)
                values.append(bytes(data[start:at]).decode())
        except struct.error:
            self.fail(f"file ends inside string {len(values)} of an array", at=at)
        except UnicodeDecodeError as error:
            self.fail(f"string {len(values)} is not valid UTF-8", at=start + error.start)
        self.at = at
        return values

    def check_alignment(self, type: int, value: Any, start: int) -> int:
        power = type == _UINT32 and value >= 8 and value & (value - 1) == 0
        if not power or value > MAX_ALIGNMENT:
            self.fail(f"alignment {value!r}", "a uint32 power of two from 8 to 2^30", start)
        return value

    def tensor(self, name: str, alignment: int) -> RawTensor:
        """Read one entry. Its offset still counts from the start of the tensor data."""
        start = self.at
        num_dims = self.u32("the number of dimensions")
        if not 1 <= num_dims <= MAX_DIMS:
            self.fail(f"{num_dims} dimensions", f"1 to {MAX_DIMS}", start)
        dims = [self.size_field("a dimension") for _ in range(num_dims)]
        weights = 1
        for dim in dims:
            weights *= dim
        if weights == 0:
            self.fail(f"shape {dims[::-1]}", "dimensions of at least 1", start)
        type = self.tensor_type()
        size = TYPE_SIZES[type]
        if dims[0] % size.block_weights:
            self.fail(
                f"{type.name} rows of {dims[0]} weights",
                f"a multiple of {size.block_weights}",
                start,
            )
        start = self.at
        offset = self.u64("an offset")
        if offset % alignment:
            self.fail(f"data offset {offset}", f"a multiple of {alignment}", start)
        nbytes = weights // size.block_weights * size.block_bytes
        return RawTensor(name, type, tuple(dims[::-1]), offset, nbytes)

    def tensor_type(self) -> GGMLType:
        start = self.at
        id = self.u32("a tensor type")
        if id == GGMLType.MXFP4:
            return self.type_39
        try:
            return GGMLType(id)
        except ValueError:
            was = (
                f" ({_REMOVED_TYPES[id]}, removed from the format)" if id in _REMOVED_TYPES else ""
            )
            self.fail(f"tensor type {id}{was}", "a known GGML type", start)

    def place(self, raw: dict[str, RawTensor], alignment: int) -> dict[str, RawTensor]:
        """Check that tensors lie in the file without overlap; make offsets absolute."""
        data_start = -(-self.at // alignment) * alignment
        end, before = 0, ""
        for tensor in sorted(raw.values(), key=lambda tensor: tensor.offset):
            self.about = tensor.name
            at = data_start + tensor.offset
            if tensor.offset < end:
                hint = _type_39_hint(raw[before].type)
                self.fail(f"its data overlaps that of {before!r}{hint}", at=at)
            end, before = tensor.offset + tensor.nbytes, tensor.name
            if data_start + end > self.size:
                hint = _type_39_hint(tensor.type)
                self.fail(
                    f"its data of {tensor.nbytes} bytes runs past the end of the file{hint}",
                    f"a file of at least {data_start + end} bytes, it has {self.size}",
                    at,
                )
        return {
            name: RawTensor(name, t.type, t.shape, data_start + t.offset, t.nbytes)
            for name, t in raw.items()
        }


def _type_39_hint(type: GGMLType) -> str:
    """Q1_0 takes a quarter of the bytes of MXFP4, whose number it has in OxiLLaMa's files."""
    if type != GGMLType.MXFP4:
        return ""
    return "; if type 39 means Q1_0 here, as OxiLLaMa has it, set type_39_is_q1_0"
