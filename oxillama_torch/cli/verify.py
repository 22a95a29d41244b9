"""``oxillama verify``: is this file whole and well formed?"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from oxillama_torch.errors import GGUFError
from oxillama_torch.gguf.reader import read_gguf

__all__ = ["verify"]

_CHUNK_BYTES = 8 * 1024 * 1024


def verify(
    model: Annotated[Path, typer.Argument(help="GGUF file, or any shard of a split set.")],
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="Expected SHA-256 of the file, in hex.")
    ] = None,
    hash: Annotated[bool, typer.Option(help="Compute the file's SHA-256.")] = True,
) -> None:
    """Check header, metadata, tensor bounds and, if given, the checksum of a file."""
    if not model.exists():
        raise FileNotFoundError(2, "no such model file", str(model))
    file = read_gguf(model)
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    print(f"{model}: GGUF v{file.version}, architecture {file.architecture}")
    print(f"{len(file.metadata)} metadata keys, {len(file.tensors)} tensors, {total:,} bytes")
    file.close()
    if hash or sha256:
        digest = _digest(model)
        print(f"sha256 {digest}")
        if sha256 is not None and digest != sha256.lower():
            raise GGUFError("checksum differs", path=str(model), expected=sha256.lower())
    print("ok")


def _digest(path: Path) -> str:
    """SHA-256 of a file, with progress for long ones."""
    digest = hashlib.sha256()
    steps = max(1, -(-path.stat().st_size // _CHUNK_BYTES))
    with path.open("rb") as file:
        for _ in track(
            range(steps), description="hashing", transient=True, disable=not sys.stdout.isatty()
        ):
            digest.update(file.read(_CHUNK_BYTES))
    return digest.hexdigest()
