"""Opening files and split sets. Oracle: files written by gguf-py, and by hand."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf import read_gguf
from oxillama_torch.gguf.types import GGMLType
from tests.support.gguf_bytes import STRING, UINT8, UINT16, File, every_type


def gguf_py_file(path: Path) -> dict[str, np.ndarray]:
    """Write a file with gguf-py; return the float32 values of its tensors."""
    random = np.random.default_rng(0)
    values = {
        "f32": random.standard_normal((3, 64), np.float32),
        "f16": random.standard_normal((2, 4, 8), np.float32),
        "q8": random.standard_normal((5, 96), np.float32),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["<s>", "é", "a b"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_tensor("f32", values["f32"])
    writer.add_tensor("f16", values["f16"].astype(np.float16))
    q8 = gguf.quants.quantize(values["q8"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {**values, "q8": q8}


def test_reads_what_gguf_py_writes(tmp_path: Path) -> None:
    values = gguf_py_file(tmp_path / "m.gguf")
    with read_gguf(tmp_path / "m.gguf") as model:
        assert (model.version, model.architecture) == (3, "llama")
        assert model.metadata["llama.block_count"] == 2
        assert model.metadata["tokenizer.ggml.tokens"] == ["<s>", "é", "a b"]
        assert model.metadata["tokenizer.ggml.scores"].tolist() == [0.0, -1.5, 2.0]
        info = {name: (t.type, t.shape, t.nbytes, t.shard) for name, t in model.tensors.items()}
        assert info == {
            "f32": (GGMLType.F32, (3, 64), 768, 0),
            "f16": (GGMLType.F16, (2, 4, 8), 128, 0),
            "q8": (GGMLType.Q8_0, (5, 96), 510, 0),
        }
        assert torch.equal(
            model.data("f32").view(torch.float32).view(3, 64), torch.from_numpy(values["f32"])
        )
        assert torch.equal(model.data("q8"), torch.from_numpy(values["q8"]).flatten())


def test_data_outlives_close_and_never_changes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf_py_file(path)
    before = path.read_bytes()
    model = read_gguf(path)
    data = model.data("q8")
    model.close()
    data += 1
    assert data.sum() != 0
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="closed"):
        model.data("q8")
    with pytest.raises(KeyError):
        read_gguf(path).data("missing")


def test_a_closed_model_gives_its_descriptors_back(tmp_path: Path) -> None:
    gguf_py_file(tmp_path / "m.gguf")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with read_gguf(tmp_path / "m.gguf"):
            pass
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.gguf", "cannot open.*No such file"),
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("empty.gguf", "empty"),
        ("nul\0.gguf", "cannot open"),
        ("text.gguf", "not a GGUF file"),
        ("loop.gguf", "cannot open"),
    ],
)
def test_what_is_no_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("hello, this is no model")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    with pytest.raises(GGUFError, match=message):
        read_gguf(tmp_path / name)


def test_a_missing_file_has_its_cause(tmp_path: Path) -> None:
    with pytest.raises(GGUFError) as raised:
        read_gguf(tmp_path / "missing.gguf")
    assert isinstance(raised.value.__cause__, FileNotFoundError)


def test_a_symlink_to_a_file_is_followed(tmp_path: Path) -> None:
    gguf_py_file(tmp_path / "m.gguf")
    (tmp_path / "link").symlink_to(tmp_path / "m.gguf")
    assert read_gguf(tmp_path / "link").architecture == "llama"


def test_a_sparse_terabyte_is_mapped_not_read(tmp_path: Path) -> None:
    file = File().tensor("huge", [1 << 20, 1 << 18])
    path = tmp_path / "m.gguf"
    path.write_bytes(file.build())
    os.truncate(path, (1 << 40) + 4096)
    try:
        model = read_gguf(path)
    finally:
        os.truncate(path, 0)
    assert model.tensors["huge"].nbytes == 1 << 40


def test_a_file_that_shrank_is_noticed(tmp_path: Path) -> None:
    gguf_py_file(tmp_path / "m.gguf")
    model = read_gguf(tmp_path / "m.gguf")
    os.truncate(tmp_path / "m.gguf", model.tensors["q8"].offset)
    with pytest.raises(GGUFError, match="shrank.*'q8'"):
        model.data("q8")


@pytest.mark.parametrize("key", [None, (UINT8, b"\1"), (STRING, File().string(""))])
def test_architecture_must_be_named(tmp_path: Path, key) -> None:
    file = File()
    if key:
        file.key("general.architecture", *key)
    (tmp_path / "m.gguf").write_bytes(file.build())
    with pytest.raises(GGUFError, match="general.architecture"):
        _ = read_gguf(tmp_path / "m.gguf").architecture


def shard(number: int, count: int, total: int = 3, **tensors: int) -> File:
    """One file of a split set, with tensors of one value each."""
    file = File()
    if number == 0:
        file.key("general.architecture", STRING, file.string("llama"))
    for name, value in (("no", number), ("count", count)):
        file.key(f"split.{name}", UINT16, struct.pack("<H", value))
    file.key("split.tensors.count", 5, struct.pack("<i", total))
    for index, (name, value) in enumerate(tensors.items()):
        file.tensor(name, [1], 0, index * 32)
        file.data += struct.pack("<f", value).ljust(32, b"\0")
    return file


def write_set(folder: Path, *files: File) -> list[Path]:
    paths = [folder / f"m-{i:05d}-of-{len(files):05d}.gguf" for i in range(1, len(files) + 1)]
    for path, file in zip(paths, files):
        path.write_bytes(file.build())
    return paths


def test_a_split_set_opens_from_any_of_its_files(tmp_path: Path) -> None:
    paths = write_set(tmp_path, shard(0, 3), shard(1, 3, a=1, b=2), shard(2, 3, c=3))
    for path in paths:
        model = read_gguf(path)
        assert model.path == path
        assert model.architecture == "llama"
        values = {n: model.data(n).view(torch.float32).item() for n in model.tensors}
        assert values == {"a": 1.0, "b": 2.0, "c": 3.0}
        assert [t.shard for t in model.tensors.values()] == [1, 1, 2]


def test_a_split_set_written_by_gguf_py(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for index in range(5):
        writer.add_tensor(f"t{index}", np.full(8, index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = read_gguf(tmp_path / "m-00002-of-00003.gguf")
    assert [model.data(f"t{i}").view(torch.float32)[0].item() for i in range(5)] == [0, 1, 2, 3, 4]


def test_split_count_one_is_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(shard(0, 1, a=1).build())
    assert list(read_gguf(tmp_path / "m.gguf").tensors) == ["a"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((shard(0, 2, a=1), shard(0, 2, b=2, c=3)), "0; .*00002.*'split.no'.*expected 1"),
        ((shard(0, 2, a=1), shard(1, 3, b=2, c=3)), "3; .*'split.count'.*expected 2"),
        ((shard(0, 2, a=1), shard(1, 2, a=2, c=3)), "tensor is in .*00001.* too.*'a'"),
        ((shard(0, 2, a=1), shard(1, 2, b=2)), "2 tensors.*expected 3"),
        ((shard(0, 3, a=1), shard(1, 3, b=2)), "file 1 of a split set of 3 is not named"),
        (
            (shard(0, 2, a=1), shard(1, 2, b=2, c=3).uint32("llama.block_count", 1)),
            "differs.*'llama.block_count'",
        ),
    ],
)
def test_files_that_do_not_fit_together(tmp_path: Path, files, message: str) -> None:
    with pytest.raises(GGUFError, match=message):
        read_gguf(write_set(tmp_path, *files)[0])


def test_a_missing_file_of_a_set_is_named(tmp_path: Path) -> None:
    paths = write_set(tmp_path, shard(0, 3), shard(1, 3, a=1, b=2), shard(2, 3, c=3))
    paths[1].unlink()
    with pytest.raises(GGUFError, match="cannot open.*m-00002-of-00003"):
        read_gguf(paths[2])


def test_a_set_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "renamed.gguf").write_bytes(shard(0, 2, a=1).build())
    with pytest.raises(GGUFError, match="not named as such.*expected a name that ends in -00001"):
        read_gguf(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("payload", [(STRING, File().string("2")), (5, struct.pack("<i", -2))])
def test_split_count_must_be_a_count(tmp_path: Path, payload) -> None:
    (tmp_path / "m.gguf").write_bytes(File().key("split.count", *payload).build())
    with pytest.raises(GGUFError, match="'split.count'.*expected a count"):
        read_gguf(tmp_path / "m.gguf")


def test_version_1_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(every_type(1).build())
    model = read_gguf(tmp_path / "m.gguf")
    assert model.version == 1
    assert model.data("vector").view(torch.float32).tolist() == [0, 1, 2, 3, 4]
