"""Multipart bodies read piece by piece: a file goes where it is kept, never into memory whole."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from flask import Request
from werkzeug.sansio.multipart import (
    Data,
    Epilogue,
    Event,
    Field,
    File,
    MultipartDecoder,
    NeedData,
)

from oxillama_torch.errors import RequestError
from oxillama_torch.server.http import client_socket

__all__ = ["receive"]

T = TypeVar("T")

_PIECE_BYTES = 64 * 1024
# Of everything in a body but the files' content: names, headers, fields.
_MAX_FORM_BYTES = 512 * 1024
_MAX_PARTS = 64
# A body may take this long, and longer for what it is long.
_PATIENCE_S = 30.0
_SLOWEST_BYTES_PER_S = 64 * 1024


def receive(
    request: Request, max_bytes: int, keep: Callable[[str, io.RawIOBase], T]
) -> tuple[dict[str, str], dict[str, T]]:
    """Read a multipart body.

    Args:
        request: nothing of its body has been read.
        max_bytes: of the body; takes the place of the application's limit.
        keep: called with (file name, stream) of each file; must read the stream to its end.

    Returns: the fields by name, and what ``keep`` has returned by the field's name.

    Raises:
        RequestError: not multipart, malformed, or cut short.
        RequestEntityTooLarge: too much of it.
    """
    request.max_content_length = max_bytes
    boundary = request.mimetype_params.get("boundary", "")
    if request.mimetype != "multipart/form-data" or not boundary:
        raise RequestError("the body must be multipart/form-data", code="invalid_request")
    nbytes = max_bytes if request.content_length is None else request.content_length
    with _time_limit(client_socket(), _PATIENCE_S + nbytes / _SLOWEST_BYTES_PER_S):
        return _receive(_Parts(request.stream, boundary), keep)


def _receive(
    parts: _Parts, keep: Callable[[str, io.RawIOBase], T]
) -> tuple[dict[str, str], dict[str, T]]:
    fields: dict[str, str] = {}
    files: dict[str, T] = {}
    while not isinstance(event := parts.next(), Epilogue):
        if not isinstance(event, Field | File):
            continue
        if not event.name or event.name in fields or event.name in files:
            raise RequestError("the parts of the body must have names of their own")
        if isinstance(event, File):
            files[event.name] = keep(event.filename, _Content(parts))
        else:
            fields[event.name] = _text(event.name, _Content(parts).readall())
    return fields, files


@contextlib.contextmanager
def _time_limit(sock: socket.socket | None, seconds: float) -> Iterator[None]:
    """End the connection's input when the block takes longer: a byte now and then keeps reads
    alive, and with them a thread."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RD)

    if sock is None:
        yield
        return
    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Parts:
    """The events of a body."""

    def __init__(self, stream, boundary: str) -> None:
        self._stream = stream
        self._decoder = MultipartDecoder(
            boundary.encode("latin-1", "replace"), _MAX_FORM_BYTES, max_parts=_MAX_PARTS
        )

    def next(self) -> Event:
        """The next event, which is not NeedData."""
        try:
            while isinstance(event := self._decoder.next_event(), NeedData):
                self._decoder.receive_data(self._stream.read(_PIECE_BYTES) or None)
        except ValueError:
            raise RequestError(
                "the multipart body is malformed or cut short", code="invalid_request"
            ) from None
        return event


class _Content(io.RawIOBase):
    """The content of one part, readable once."""

    def __init__(self, parts: _Parts) -> None:
        self._parts, self._rest, self._more = parts, b"", True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest and self._more:
            event = self._parts.next()
            assert isinstance(event, Data), "a part ends with data that says so"
            self._rest, self._more = event.data, event.more_data
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def readall(self) -> bytes:
        """As the base class; bounded like every field."""
        data = b""
        while piece := self.read(_PIECE_BYTES):
            data += piece
            if len(data) > _MAX_FORM_BYTES:
                raise RequestError("a field is too long", status=413, code="request_too_large")
        return data


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RequestError("a field is not UTF-8", param=name) from None
