"""The writer. Oracle: gguf-py's reader and its quantizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf import read_gguf
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.gguf.writer import ENCODABLE, write_gguf

VALUES = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
ARCHITECTURE = {"general.architecture": "llama"}


def test_metadata_types(tmp_path: Path) -> None:
    types = gguf.GGUFValueType
    written = {
        **ARCHITECTURE,
        "int": (3, types.UINT32),
        "negative": (-3, types.INT32),
        "large": (1 << 40, types.UINT64),
        "large_negative": (-(1 << 40), types.INT64),
        "float": (0.5, types.FLOAT32),
        "bool": (True, types.BOOL),
        "text": ("é", types.STRING),
        "numpy": (np.float64(0.1), types.FLOAT64),
        "small": (np.uint8(7), types.UINT8),
    }
    arrays = {
        "ints": ([1, -2], types.INT32),
        "numbers": ([1, 2.5], types.FLOAT32),
        "bools": ([True, False], types.BOOL),
        "words": (["a", ""], types.STRING),
        "array": (np.array([1, 2], np.uint16), types.UINT16),
    }
    path = tmp_path / "m.gguf"
    values = {k: v if k == "general.architecture" else v[0] for k, v in written.items()}
    write_gguf(path, {**values, **{k: v[0] for k, v in arrays.items()}}, {})
    fields = gguf.GGUFReader(path).fields
    del written["general.architecture"]
    for key, (value, type) in written.items():
        assert (fields[key].types, fields[key].contents()) == ([type], value), key
    for key, (value, type) in arrays.items():
        assert fields[key].types == [types.ARRAY, type], key
        assert fields[key].contents() == list(value), key


@pytest.mark.parametrize("type", sorted(ENCODABLE))
def test_tensors_are_encoded(tmp_path: Path, type: str) -> None:
    write_gguf(tmp_path / "m.gguf", ARCHITECTURE, {"w": (VALUES, type)})
    tensor = gguf.GGUFReader(tmp_path / "m.gguf").tensors[0]
    assert (tensor.name, tensor.tensor_type.name, tensor.shape.tolist()) == ("w", type, [512, 3])
    wanted = gguf.quants.quantize(VALUES, gguf.GGMLQuantizationType[type])
    assert np.array_equal(tensor.data.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("shape", [(2, 2, 144), (144,)])
def test_blocks_are_written_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    given = blocks.tobytes() if len(shape) == 1 else blocks
    write_gguf(
        tmp_path / "m.gguf", {**ARCHITECTURE, "general.alignment": 64}, {"w": (given, "Q4_K")}
    )
    model = read_gguf(tmp_path / "m.gguf")
    size = TYPE_SIZES[GGMLType.Q4_K]
    assert model.tensors["w"].shape == (*shape[:-1], size.block_weights)
    assert model.tensors["w"].offset % 64 == 0
    assert model.data("w").numpy().tobytes() == blocks.tobytes()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedError, match="no encoder for Q4_K; supported: BF16"):
        write_gguf(path, ARCHITECTURE, {"w": (VALUES, "Q4_K")})
    with pytest.raises(UnsupportedError, match="cannot write Q2_0"):
        write_gguf(path, ARCHITECTURE, {"w": (bytes(18), "Q2_0")})
    with pytest.raises(ValueError, match="key: GGUF holds no dict"):
        write_gguf(path, {**ARCHITECTURE, "key": {}}, {})
    with pytest.raises(ValueError, match="key: .*empty array"):
        write_gguf(path, {**ARCHITECTURE, "key": []}, {})
