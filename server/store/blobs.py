"""Blobs: files whose content is on the disk before anything names them."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from oxillama_torch.errors import RequestError
from oxillama_torch.server.store.errors import StoreError

__all__ = ["Blobs"]

_PART_BYTES = 1024 * 1024
_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Blobs:
    """A folder of immutable files, readable by their owner alone.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove_parts(self) -> None:
        """Remove what an interrupted ``put`` has left; only while nobody else uses the folder."""
        for path in self._folder.glob("*.part"):
            path.unlink(missing_ok=True)

    def put(self, stream: BinaryIO, max_bytes: int | None = None) -> tuple[str, int]:
        """Keep what ``stream`` holds; returns its id and its number of bytes.

        Raises:
            RequestError: more than ``max_bytes``.
            StoreError: the disk is full or fails.
        """
        blob_id = uuid.uuid4().hex
        part = self._folder / f"{blob_id}.part"
        try:
            nbytes = self._write(part, stream, max_bytes)
            os.rename(part, self._folder / blob_id)
            self._sync_folder()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StoreError("the disk is full" if full else "the disk reports an error") from error
        finally:
            part.unlink(missing_ok=True)
        return blob_id, nbytes

    def _write(self, path: Path, stream: BinaryIO, max_bytes: int | None) -> int:
        nbytes = 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            while data := stream.read(_PART_BYTES):
                nbytes += len(data)
                if max_bytes is not None and nbytes > max_bytes:
                    raise RequestError(
                        f"more than {max_bytes} bytes", status=413, code="request_too_large"
                    )
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return nbytes

    def _sync_folder(self) -> None:
        """A file's name is on the disk only when its folder is."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def open(self, blob_id: str) -> BinaryIO:
        """The content, for reading.

        Raises:
            FileNotFoundError: no such blob.
        """
        return open(self._path(blob_id), "rb")

    def delete(self, blob_id: str) -> None:
        """Remove a blob; one that is not there is no error."""
        self._path(blob_id).unlink(missing_ok=True)

    def ids(self) -> Iterator[str]:
        """All blobs: a row that names one may never have been written."""
        return (path.name for path in self._folder.iterdir() if _ID.fullmatch(path.name))

    def _path(self, blob_id: str) -> Path:
        assert _ID.fullmatch(blob_id), "blob ids are ours, never a client's"
        return self._folder / blob_id
