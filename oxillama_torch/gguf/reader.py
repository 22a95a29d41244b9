"""Open a GGUF model: map its file or its split set, check it, hand out views of the tensors.

Nothing is read beyond the header until a tensor is used, and nothing is copied: ``data`` gives
views of the mapping. The mapping is private, so writing to a view by mistake changes neither the
file nor another process. It ends when the last view is gone.

A file must not be shortened while it is mapped: the system answers an access behind its end with
SIGBUS, which ends the process. ``data`` looks at the size again each time it is called, which
catches a file that was replaced in place while a model was loading.

Split sets (source: llama.cpp's gguf-split): ``NAME-00001-of-00003.gguf``, each with its own tensor
table; ``split.no``, ``split.count`` and ``split.tensors.count`` in each; other keys in the first.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf.parser import Header, parse_header
from oxillama_torch.gguf.types import GGMLType

__all__ = ["GGUFFile", "TensorInfo", "read_gguf"]

# Without it, Linux counts a private mapping as memory that may be written, and refuses to map a
# model larger than RAM and swap. Python names the flag from 3.13 on.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_SHARD_NAME = re.compile(r"(?P<base>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Args:
        shape: row-major, as torch has it: (N, K) for a matrix of N rows of K weights.
        offset: first byte, counted from the start of its file.
        nbytes: size of its data.
        shard: index of its file in a split set, else 0.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    shard: int


class GGUFFile:
    """A GGUF model, opened with ``read_gguf``. Also a context manager.

    Attributes:
        path: the file that was asked for.
        version: GGUF version of the first file.
        metadata: key -> bool, int, float, str, list (of str or of arrays) or read-only numpy array.
        tensors: name -> TensorInfo, in file order.
    """

    def __init__(self, path: Path, shards: list[_Shard]) -> None:
        self.path = path
        self.version = shards[0].header.version
        self.metadata: dict[str, Any] = shards[0].header.metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._shards = shards
        for index, shard in enumerate(shards):
            for raw in shard.header.tensors.values():
                if raw.name in self.tensors:
                    first = shards[self.tensors[raw.name].shard].path
                    raise GGUFError(
                        f"tensor is in {first} too", path=str(shard.path), tensor=raw.name
                    )
                self.tensors[raw.name] = TensorInfo(
                    raw.name, raw.type, raw.shape, raw.offset, raw.nbytes, index
                )

    @property
    def architecture(self) -> str:
        """``general.architecture``; GGUFError when the file does not say."""
        value = self.metadata.get("general.architecture")
        if not isinstance(value, str) or not value:
            raise GGUFError("no architecture", path=str(self.path), tensor="general.architecture")
        return value

    def data(self, name: str) -> torch.Tensor:
        """The bytes of a tensor as they lie in the file: uint8 [nbytes], a view of the mapping.

        Raises:
            KeyError: there is no such tensor.
            GGUFError: the file is shorter now than when it was opened.
            ValueError: the model is closed.
        """
        info = self.tensors[name]
        if not self._shards:
            raise ValueError(f"{self.path} is closed")
        shard = self._shards[info.shard]
        size = shard.mapping.size()
        if size < info.offset + info.nbytes:
            raise GGUFError(
                f"the file shrank to {size} bytes after it was opened",
                path=str(shard.path),
                tensor=name,
                offset=info.offset,
            )
        return torch.frombuffer(
            shard.mapping, dtype=torch.uint8, count=info.nbytes, offset=info.offset
        )

    def entry(self, key: str) -> bytes:
        """Name, type and value of a metadata key, as they lie in the file."""
        shard = self._shards[0]
        start, stop = shard.header.entries[key]
        return bytes(shard.mapping[start:stop])

    def close(self) -> None:
        """Let go of the mapping; views that were handed out stay valid."""
        self._shards = []

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        type: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    mapping: mmap.mmap
    header: Header
    type_39_is_q1_0: bool

    def key(self, name: str) -> int:
        """The value of a ``split.*`` key, 0 when it is missing."""
        value = self.header.metadata.get(name, 0)
        if not isinstance(value, int) or value < 0:
            raise GGUFError(f"{value!r}", path=str(self.path), tensor=name, expected="a count")
        return value


def read_gguf(path: str | os.PathLike[str], *, type_39_is_q1_0: bool = False) -> GGUFFile:
    """Open and check a GGUF file, or the split set that a file belongs to.

    Args:
        path: the file, or any one of the files of a split set.
        type_39_is_q1_0: read tensor type 39 as Q1_0, for files of OxiLLaMa 0.1. Everywhere else 39
            is MXFP4 and 41 is Q1_0.

    Raises:
        GGUFError: the file cannot be opened (the OSError is its cause), is malformed, or files of
            the set are missing or do not fit together.
    """
    path = Path(path)
    first = _open(path, type_39_is_q1_0)
    count = first.key("split.count")
    shards = [first] if count <= 1 else _open_set(first, count)
    gguf = GGUFFile(path, shards)
    expected = shards[0].key("split.tensors.count") if count > 1 else len(gguf.tensors)
    if len(gguf.tensors) != expected:
        raise GGUFError(
            f"the split set has {len(gguf.tensors)} tensors",
            path=str(path),
            tensor="split.tensors.count",
            expected=str(expected),
        )
    return gguf


def _open(path: Path, type_39_is_q1_0: bool) -> _Shard:
    try:
        # Not blocking: a FIFO without a writer would hold open() for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise GGUFError(f"cannot open the file: {reason}", path=str(path)) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError("not a regular file", path=str(path))
        if status.st_size == 0:
            raise GGUFError("the file is empty", path=str(path))
        mapping = mmap.mmap(
            fd,
            status.st_size,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    except (OSError, ValueError) as error:  # ValueError: it shrank between fstat and mmap
        raise GGUFError(f"cannot map the file: {error}", path=str(path)) from error
    finally:
        os.close(fd)
    header = parse_header(mapping, str(path), type_39_is_q1_0=type_39_is_q1_0)
    return _Shard(path, mapping, header, type_39_is_q1_0)


def _open_set(first: _Shard, count: int) -> list[_Shard]:
    """All files of the set that ``first`` (any of them) belongs to, in order."""
    number = first.key("split.no")
    match = _SHARD_NAME.fullmatch(first.path.name)
    expected = f"{number + 1:05d}-of-{count:05d}.gguf"
    if match is None or not first.path.name.endswith(f"-{expected}"):
        raise GGUFError(
            f"file {number + 1} of a split set of {count} is not named as such",
            path=str(first.path),
            tensor="split.no",
            expected=f"a name that ends in -{expected}",
        )
    shards = []
    for index in range(count):
        path = first.path.with_name(f"{match['base']}-{index + 1:05d}-of-{count:05d}.gguf")
        shard = first if index == number else _open(path, first.type_39_is_q1_0)
        for key, value in (("split.no", index), ("split.count", count)):
            if shard.key(key) != value:
                raise GGUFError(
                    f"{shard.key(key)}", path=str(path), tensor=key, expected=str(value)
                )
        shards.append(shard)
    for shard in shards[1:]:
        _check_same_metadata(shards[0], shard)
    return shards


def _check_same_metadata(first: _Shard, other: _Shard) -> None:
    """Keys of a later file must say what the first file says: only those are used."""
    for key, value in other.header.metadata.items():
        if key.startswith("split."):
            continue
        if key not in first.header.metadata or not _equal(first.header.metadata[key], value):
            raise GGUFError(
                f"the key differs from that in {first.path}", path=str(other.path), tensor=key
            )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(np.array_equal(a, b))
