"""Typed metadata access. Oracle: the rules of its docstrings."""

from __future__ import annotations

import numpy as np
import pytest

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf.metadata import Metadata

VALUES = {
    "general.architecture": "llama",
    "general.name": "some name",
    "general.quantization_version": 2,
    "llama.block_count": 3,
    "llama.context_length": 128,
    "llama.rope.freq_base": 1e4,
    "llama.rope.scale": float("nan"),
    "llama.tied": True,
    "llama.heads": np.array([4, 2, 4], np.uint32),
    "llama.scales": np.array([0.5, 1.5], np.float32),
    "llama.flags": np.array([True, False]),
    "llama.names": ["a", "b"],
    "tokenizer.ggml.model": "gpt2",
    "quantize.imatrix.file": "x",
    "vendor.note": 1,
}


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(VALUES, "m.gguf")


@pytest.mark.parametrize(
    ("key", "type", "value"),
    [
        ("llama.block_count", int, 3),
        ("llama.block_count", float, 3.0),
        ("llama.rope.freq_base", float, 1e4),
        ("llama.tied", bool, True),
        ("general.name", str, "some name"),
        ("llama.heads", list[int], [4, 2, 4]),
        ("llama.heads", list[float], [4.0, 2.0, 4.0]),
        ("llama.scales", list[float], [0.5, 1.5]),
        ("llama.flags", list[bool], [True, False]),
        ("llama.names", list[str], ["a", "b"]),
    ],
)
def test_get(metadata: Metadata, key: str, type, value) -> None:
    got = metadata.get(key, type)
    assert got == value
    element, wanted = (got[0], value[0]) if isinstance(value, list) else (got, value)
    assert element.__class__ is wanted.__class__


def test_get_array_as_it_is(metadata: Metadata) -> None:
    assert metadata.get("llama.heads", np.ndarray) is VALUES["llama.heads"]


@pytest.mark.parametrize(
    ("key", "type", "message"),
    [
        ("llama.block_count", str, "int '3'.*'llama.block_count'.*expected str"),
        ("llama.block_count", bool, "expected bool"),
        ("llama.tied", int, "bool 'True'.*expected int"),
        ("llama.tied", float, "expected float"),
        ("llama.rope.freq_base", int, "expected int"),
        ("llama.rope.scale", float, "value nan.*finite"),
        ("llama.heads", int, "array of 3.*expected int"),
        ("llama.block_count", list[int], "int '3'.*expected an array of int"),
        ("llama.scales", list[int], "expected int"),
        ("llama.names", np.ndarray, "expected an array of numbers"),
        ("llama.missing", int, "missing metadata key.*m.gguf.*'llama.missing'"),
    ],
)
def test_get_refuses(metadata: Metadata, key: str, type, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        metadata.get(key, type)


def test_default_is_for_missing_keys_only(metadata: Metadata) -> None:
    assert metadata.get("llama.missing", int, None) is None
    with pytest.raises(GGUFError, match="expected str"):
        metadata.get("llama.block_count", str, "x")


def test_bounds_hold_for_each_value(metadata: Metadata) -> None:
    assert metadata.get("llama.heads", list[int], at_least=2, at_most=4) == [4, 2, 4]
    with pytest.raises(GGUFError, match="value 2; .*at least 3"):
        metadata.get("llama.heads", list[int], at_least=3)
    with pytest.raises(GGUFError, match="value 3; .*at most 2"):
        metadata.get("llama.block_count", int, at_most=2)


def test_per_layer(metadata: Metadata) -> None:
    assert metadata.per_layer("llama.heads", int, 3) == (4, 2, 4)
    assert metadata.per_layer("llama.block_count", int, 2) == (3, 3)
    assert metadata.per_layer("llama.missing", int, 2, 8) == (8, 8)
    with pytest.raises(GGUFError, match="array of 3.*expected one value or 4"):
        metadata.per_layer("llama.heads", int, 4)
    with pytest.raises(GGUFError, match="at least 3"):
        metadata.per_layer("llama.heads", int, 3, at_least=3)


def test_unread_lists_what_can_change_results(metadata: Metadata) -> None:
    for key in ("llama.block_count", "llama.missing"):
        metadata.get(key, int, None)
    _ = metadata["llama.tied"]
    assert metadata.architecture == "llama"
    assert metadata.unread() == [
        "llama.rope.freq_base",
        "llama.rope.scale",
        "llama.heads",
        "llama.scales",
        "llama.flags",
        "llama.names",
    ]


def test_looking_for_a_key_is_not_reading_it(metadata: Metadata) -> None:
    assert "llama.heads" in metadata
    assert len(metadata) == len(list(metadata)) == len(VALUES)
    assert "llama.heads" in metadata.unread()


def test_blocks_of_another_version_are_not_understood() -> None:
    key = "general.quantization_version"
    assert Metadata({key: 2}).unread() == []
    assert Metadata({key: 1}).unread() == [key]
    assert Metadata({key: np.array([2, 2])}).unread() == [key]
