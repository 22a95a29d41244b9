"""The header parser against files written by hand from the GGUF specification."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf.parser import parse_header
from oxillama_torch.gguf.types import GGMLType
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    FLOAT32,
    Q4_0,
    STRING,
    UINT8,
    UINT32,
    UINT64,
    File,
    every_type,
)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_reads_every_value_type(version: int) -> None:
    header = parse_header(every_type(version).build())
    assert header.version == version
    metadata = dict(header.metadata)
    assert metadata.pop("a.floats").tolist() == [0.5, -1.0]
    assert metadata.pop("a.bools").tolist() == [True, False]
    assert metadata.pop("a.empty").tolist() == []
    numbers, words = metadata.pop("a.nested")
    assert (numbers.tolist(), numbers.dtype, words) == ([1, -1], np.int16, ["x"])
    assert metadata == {
        "general.architecture": "llama",
        "a.u8": 254, "a.i8": -2, "a.u16": 65535, "a.i16": -2, "a.u32": 1 << 31, "a.i32": -3,
        "a.f32": 1.5, "a.bool": True, "a.u64": 1 << 63, "a.i64": -4, "a.f64": 0.1,
        "a.text": "héllo", "a.words": ["", "a\0b", "é"],
    }  # fmt: skip
    assert type(metadata["a.bool"]) is bool


@pytest.mark.parametrize("version", [1, 2, 3])
def test_places_tensors(version: int) -> None:
    data = every_type(version).build()
    tensors = parse_header(data).tensors
    assert [(t.name, t.type, t.shape, t.nbytes) for t in tensors.values()] == [
        ("matrix.weight", GGMLType.F32, (3, 4), 48),
        ("packed.weight", GGMLType.Q4_0, (2, 64), 72),
        ("vector", GGMLType.F32, (5,), 20),
    ]
    matrix, packed, vector = tensors.values()
    assert np.frombuffer(data, "<f4", 12, matrix.offset).tolist() == list(range(12))
    assert data[packed.offset : packed.offset + 72] == bytes(range(72))
    assert np.frombuffer(data, "<f4", 5, vector.offset).tolist() == list(range(5))


def test_numeric_arrays_are_read_only_views() -> None:
    data = bytearray(every_type().build())
    floats = parse_header(data).metadata["a.floats"]
    at = data.index(struct.pack("<2f", 0.5, -1))
    data[at : at + 4] = struct.pack("<f", 7)
    assert floats.tolist() == [7.0, -1.0]
    with pytest.raises(ValueError, match="read-only"):
        floats[0] = 1


def test_tensor_may_lie_in_any_order_with_gaps_and_its_own_alignment() -> None:
    file = File(alignment=64).uint32("general.alignment", 64)
    file.tensor("late", [2], F32, 256).tensor("early", [2], F32, 64)
    file.data = bytes(264)
    tensors = parse_header(file.build()).tensors
    assert list(tensors) == ["late", "early"]
    assert tensors["late"].offset - tensors["early"].offset == 192
    assert tensors["early"].offset % 64 == 0


def test_a_file_without_tensors_may_end_after_its_keys() -> None:
    header = parse_header(File().uint32("a", 1).header())
    assert header.tensors == {}


def test_type_39_is_mxfp4() -> None:
    """OxiLLaMa uses the number for Q1_0_G128; ggml's meaning counts."""
    file = File().tensor("t", [64], 39)
    file.data = bytes(34)
    assert parse_header(file.build()).tensors["t"].nbytes == 34


def test_type_39_is_q1_0_when_asked_for() -> None:
    """OxiLLaMa's layout, 128 weights in 18 bytes, which do not hold 128 weights of MXFP4."""
    file = File().tensor("a", [128], 39).tensor("b", [128], 39, 32)
    file.data = bytes(100)
    tensors = parse_header(file.build(), type_39_is_q1_0=True).tensors
    assert [(t.type, t.nbytes) for t in tensors.values()] == [(GGMLType.Q1_0, 18)] * 2
    with pytest.raises(GGUFError, match="overlaps that of 'a'; if type 39 means Q1_0 .*type_39_is"):
        parse_header(file.build())
    file.data = bytes(50)
    with pytest.raises(GGUFError, match="past the end of the file; if type 39 means Q1_0"):
        parse_header(file.build())


@pytest.mark.parametrize("version", [1, 2, 3])
def test_truncated_anywhere(version: int) -> None:
    data = every_type(version).build()
    for end in range(len(data)):
        with pytest.raises(GGUFError):
            parse_header(data[:end])


def with_tensor(*args, data: int = 64, **kwargs) -> bytes:
    file = File().tensor("blk.0.w", *args, **kwargs)
    file.data = bytes(data)
    return file.build()


def two_tensors(first: str, second: str, offset: int) -> bytes:
    file = File().tensor(first, [12], F32, 0).tensor(second, [8], F32, offset)
    file.data = bytes(offset + 64)
    return file.build()


def with_key(name: str | bytes, type: int, payload: bytes) -> bytes:
    return File().key(name, type, payload).build()


def with_array(type: int, count: int, payload: bytes = b"") -> bytes:
    return with_key("some.key", ARRAY, File().array(type, count, payload))


def alignment(type: int, payload: bytes) -> bytes:
    return with_key("general.alignment", type, payload)


def nest(depth: int) -> bytes:
    payload = File().array(UINT8, 0)
    for _ in range(depth):
        payload = File().array(ARRAY, 1, payload)
    return with_key("some.key", ARRAY, payload)


HUGE = [1 << 31, 1 << 63, (1 << 64) - 1, 1 << 20]
EVERY = every_type().build()

# name -> (file, what the message must say)
BAD = {
    "empty": (b"", "file ends inside the magic number"),
    "magic": (File(magic=b"GGML").build(), "not a GGUF file: it starts with b'GGML'"),
    "version_0": (File(version=0).build(), "GGUF version 0; at byte 4; expected 1, 2 or 3"),
    "version_4": (File(version=4).build(), "GGUF version 4"),
    "big_endian": (File(version=3 << 24).build(), "big-endian"),
    **{f"num_tensors_{n}": (File(num_tensors=n).build(), f"{n} tensors; at byte 8") for n in HUGE},
    **{f"num_keys_{n}": (File(num_keys=n).build(), f"{n} keys; at byte 16") for n in HUGE},
    "more_keys_than_written": (File(num_keys=2).uint32("a", 1).build(), "file ends|metadata key"),
    "key_empty": (with_key("", UINT8, b"\0"), "metadata key ''; at byte 24"),
    "key_nul": (with_key("a\0b", UINT8, b"\0"), "metadata key 'a.x00b'"),
    "key_not_utf8": (with_key(b"a\xff", UINT8, b"\0"), "key is not valid UTF-8; at byte 33"),
    "key_too_long": (with_key("k" * 65536, UINT8, b"\0"), "metadata key of 65536 bytes"),
    "key_past_end": (File(keys=[File().string(b"name", 99)]).build(), "ends inside metadata key"),
    "key_twice": (File().uint32("a.b", 1).uint32("a.b", 1).build(), "occurs twice.*'a.b'"),
    "value_type": (with_key("some.key", 13, b"\0"), "value type 13.*'some.key'"),
    "bool": (with_key("some.key", BOOL, b"\2"), "bool 2.*'some.key'"),
    "string_past_end": (
        with_key("some.key", STRING, File().string(b"abc", (1 << 64) - 1)),
        "ends inside a string.*'some.key'",
    ),
    "string_not_utf8": (
        with_key("some.key", STRING, File().string(b"\xc3\x28")),
        "not valid UTF-8.*'some.key'",
    ),
    "array_type": (with_array(13, 1, b"\0"), "array of value type 13.*'some.key'"),
    "array_past_end": (with_array(UINT8, 2_000_000, b"\0"), "2000000 numbers.*'some.key'"),
    "array_size_overflows": (with_array(UINT64, 1 << 61), "ends inside an array.*'some.key'"),
    "array_of_strings_past_end": (with_array(STRING, 1 << 20), "1048576 strings.*'some.key'"),
    "array_of_too_many_strings": (with_array(STRING, 1 << 40), "1099511627776 strings"),
    "array_string_past_end": (
        with_array(STRING, 2, File().string("a") + File().string("b", 1 << 63)),
        "string 1 of an array.*'some.key'",
    ),
    "array_string_not_utf8": (
        with_array(STRING, 2, File().string("a") + File().string(b"\xff")),
        "string 1 is not valid UTF-8.*'some.key'",
    ),
    "array_of_too_many_arrays": (with_array(ARRAY, 1 << 40), "1099511627776 arrays.*'some.key'"),
    "array_of_bools": (with_array(BOOL, 2, b"\0\7"), "bools.*'some.key'"),
    "nested_too_deep": (nest(1000), "nested more than 4 deep.*'some.key'"),
    **{
        f"alignment_{n}": (alignment(UINT32, struct.pack("<I", n)), f"alignment {n};.*alignment'")
        for n in (0, 1, 3, 4, 24, 1 << 31)
    },
    "alignment_type": (alignment(UINT64, struct.pack("<Q", 32)), "alignment 32;.*uint32"),
    "alignment_array": (
        alignment(ARRAY, File().array(UINT32, 1, struct.pack("<I", 32))),
        "alignment .*uint32",
    ),
    "tensor_name_empty": (File().tensor("", [1]).build(), "tensor name ''"),
    "tensor_name_too_long": (File().tensor("n" * 65, [1]).build(), "tensor name of 65 bytes"),
    "tensor_twice": (two_tensors("same", "same", 64), "tensor name occurs twice.*'same'"),
    "dims_0": (with_tensor([]), "0 dimensions.*'blk.0.w'"),
    "dims_5": (with_tensor([1] * 5), "5 dimensions.*'blk.0.w'"),
    "dims_many": (with_tensor([], num_dims=(1 << 32) - 1), "4294967295 dimensions"),
    "dim_0": (with_tensor([4, 0]), r"shape \[0, 4\].*'blk.0.w'"),
    "dim_negative": (with_tensor([(1 << 64) - 4]), "runs past the end.*'blk.0.w'"),
    "dims_overflow": (with_tensor([1 << 32, 1 << 32, 1 << 32]), "runs past the end.*'blk.0.w'"),
    "type_removed": (with_tensor([32], 4), r"tensor type 4 \(Q4_2, removed.*'blk.0.w'"),
    "type_unknown": (with_tensor([32], 43), "tensor type 43.*'blk.0.w'"),
    "type_negative": (with_tensor([32], (1 << 32) - 1), "tensor type 4294967295.*'blk.0.w'"),
    "row_no_whole_block": (with_tensor([48, 2], Q4_0), "Q4_0 rows of 48 weights.*'blk.0.w'"),
    "offset_unaligned": (with_tensor([1], offset=8), "data offset 8;.*multiple of 32"),
    "offset_past_end": (with_tensor([1], offset=1 << 63), "past the end of the file.*'blk.0.w'"),
    "offset_overflows": (with_tensor([8], offset=(1 << 64) - 32), "past the end.*'blk.0.w'"),
    "data_too_short": (with_tensor([17], data=64), "68 bytes runs past the end.*'blk.0.w'"),
    "overlap": (two_tensors("one", "two", 32), "overlaps that of 'one'.*'two'"),
    "same_offset": (two_tensors("one", "two", 0), "overlaps that of 'one'.*'two'"),
    "float_array_bit_flipped_to_strings": (
        EVERY.replace(struct.pack("<IQ", FLOAT32, 2), struct.pack("<IQ", STRING, 2)),
        "a.floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name: str) -> None:
    """Named in the message, and never more memory than a small multiple of the file."""
    data, message = BAD[name]
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message):
            parse_header(data)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 8 * len(data)
    finally:
        tracemalloc.stop()


def test_the_error_carries_its_parts() -> None:
    with pytest.raises(GGUFError) as raised:
        parse_header(with_tensor([48, 2], Q4_0), "some.gguf")
    error = raised.value
    assert (error.path, error.tensor, error.expected) == (
        "some.gguf",
        "blk.0.w",
        "a multiple of 32",
    )
    # magic, version, two counts; then the length and the 7 bytes of the name.
    assert error.offset == 24 + 8 + 7
