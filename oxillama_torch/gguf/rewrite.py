"""Write a GGUF file that has the metadata of another one, tensor by tensor.

Nothing is held in memory but the piece at hand. Metadata are copied byte by byte.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.gguf.parser import DEFAULT_ALIGNMENT
from oxillama_torch.gguf.reader import GGUFFile
from oxillama_torch.gguf.types import GGMLType, row_bytes

__all__ = ["NewTensor", "rewrite_gguf"]


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor of the new file.

    Args:
        shape: row-major, as torch has it.
        pieces: its bytes, uint8 [bytes] each, in order; asked for once, when its turn has come.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        *rows, columns = self.shape
        return row_bytes(self.type, columns) * math.prod(rows)


def rewrite_gguf(
    gguf: GGUFFile,
    path: str | os.PathLike[str],
    tensors: Sequence[NewTensor],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a GGUF version 3 file; it appears under its name when it is whole.

    Args:
        gguf: the open file whose metadata are copied. What a split set says of itself is not: the
            new file is one.
        path: where it goes; a file that is there is replaced.
        tensors: in order.
        progress: called with (bytes written, bytes in all) after each piece.

    Raises:
        UnsupportedError: the file is of version 1, whose counts are shorter.
        GGUFError: the pieces of a tensor are not what its type and shape say.
        OSError: it cannot be written.
    """
    if gguf.version < 2:
        raise UnsupportedError("copying the metadata of a GGUF version 1 file", ("2", "3"))
    alignment = gguf.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_header(gguf, tensors, alignment))
            _pad(file, alignment)
            _write_tensors(file, tensors, alignment, progress)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _header(gguf: GGUFFile, tensors: Sequence[NewTensor], alignment: int) -> bytes:
    keys = [key for key in gguf.metadata if not key.startswith("split.")]
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    parts += [gguf.entry(key) for key in keys]
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode()
        dimensions = tensor.shape[::-1]
        parts.append(struct.pack("<Q", len(name)) + name)
        parts.append(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", tensor.type, offset))
        offset += tensor.nbytes + -tensor.nbytes % alignment
    return b"".join(parts)


def _write_tensors(
    file: BinaryIO,
    tensors: Sequence[NewTensor],
    alignment: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        written = 0
        for piece in tensor.pieces():
            file.write(memoryview(piece.contiguous().numpy()))
            written += len(piece)
            if progress is not None:
                progress(done + written, total)
        if written != tensor.nbytes:
            raise GGUFError(
                f"{written} bytes", tensor=tensor.name, expected=f"{tensor.nbytes} bytes"
            )
        done += written
        _pad(file, alignment)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
