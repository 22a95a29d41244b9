"""One streamed answer over HTTP/1.1, read as cheaply as Python can.

What a client spends on a token is missing at a server on the same machine: general HTTP clients
take longer for an event than the server does.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson

from oxillama_torch.errors import EngineError

__all__ = ["post_stream"]

Take = Callable[[dict[str, Any], float], None]


async def post_stream(
    url: str, body: Mapping[str, Any], headers: Mapping[str, str], take: Take
) -> None:
    """POST a JSON body and read the server-sent events of the answer to their end.

    Args:
        url: ``http://`` or ``https://``.
        take: gets each event that is a JSON object, and when it arrived (``time.perf_counter``).

    Raises:
        EngineError: the answer is no success, or was cut.
        OSError: no connection.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    payload = orjson.dumps(body)
    lines = [
        f"POST {parts.path or '/'} HTTP/1.1",
        f"Host: {parts.netloc.rpartition('@')[2]}",
        "Connection: close",
        "Accept: text/event-stream",
        "Content-Type: application/json",
        f"Content-Length: {len(payload)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + payload
    loop = asyncio.get_running_loop()
    context = ssl.create_default_context() if secure else None
    transport, client = await loop.create_connection(
        lambda: _Answer(request, take), parts.hostname, port, ssl=context
    )
    try:
        await client.ended
    finally:
        transport.close()


class _Answer(asyncio.Protocol):
    """Sends the request when connected; ``ended`` is done with the answer."""

    def __init__(self, request: bytes, take: Take) -> None:
        self._request, self._take = request, take
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = bytearray()
        self._status: int | None = None
        self._chunked = False
        # Of the body: a line that is not complete.
        self._rest = b""

    def connection_made(self, transport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        self._received += data
        if self._status is None and not self._read_head():
            return
        last = False
        if self._chunked:
            body, last = self._unchunk()
        else:
            body, self._received = bytes(self._received), bytearray()
        if self._status == 200:
            *lines, self._rest = (self._rest + body).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    self._take(orjson.loads(line[6:]), now)
        else:
            self._rest += body
        if last:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._fail(error)
        elif self._status is None or self._chunked:
            self._fail(EngineError("the answer was cut"))
        else:
            self._end()

    def _read_head(self) -> bool:
        """Whether the head is complete; then it has been taken out of what was received."""
        head, end, body = bytes(self._received).partition(b"\r\n\r\n")
        if not end:
            return False
        status, *fields = head.lower().split(b"\r\n")
        self._status = int(status.split()[1])
        self._chunked = any(
            field.startswith(b"transfer-encoding:") and field.endswith(b"chunked")
            for field in fields
        )
        self._received = bytearray(body)
        return True

    def _unchunk(self) -> tuple[bytes, bool]:
        """The whole chunks that have been received, and whether the last one is among them."""
        parts = []
        while (end := self._received.find(b"\r\n")) >= 0:
            size = int(self._received[:end].partition(b";")[0], 16)
            start = end + 2
            if len(self._received) < start + size + 2 and size:
                break
            if size == 0:
                return b"".join(parts), True
            parts.append(bytes(self._received[start : start + size]))
            del self._received[: start + size + 2]
        return b"".join(parts), False

    def _end(self) -> None:
        if self._status == 200:
            if not self.ended.done():
                self.ended.set_result(None)
        else:
            self._fail(EngineError(f"{self._status}: {self._rest[:200].decode(errors='replace')}"))

    def _fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)
