"""The server's end of a WebSocket: messages in, frames out.

The request's thread reads; the output thread writes, as it writes all streams. So a connection
costs one thread, no thread is woken for a token, a client that does not read loses its own
connection, and one that sends faster than it is served waits: nothing is read ahead.

Frames are parsed by wsproto. They are never compressed: a small message could become a huge one.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import orjson
from flask import Response, current_app, g, request
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    TextMessage,
)
from wsproto.frame_protocol import LOCAL_ONLY_CLOSE_REASONS, CloseReason, Opcode
from wsproto.utilities import RemoteProtocolError

from oxillama_torch.engine.outbox import Listener
from oxillama_torch.errors import RequestError
from oxillama_torch.server.access import Access
from oxillama_torch.server.http import client_socket
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.output import Generation
from oxillama_torch.server.output_thread import OutputThread

__all__ = ["PING", "Channel", "Source", "serve_websocket"]

_READ_BYTES = 64 * 1024
_END_WAIT_S = 30.0


def frame(opcode: Opcode, payload: bytes) -> bytes:
    """One unmasked, unfragmented frame (RFC 6455, section 5.2)."""
    head = bytes([0x80 | opcode])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 1 << 16:
        return head + b"\x7e" + struct.pack("!H", len(payload)) + payload
    return head + b"\x7f" + struct.pack("!Q", len(payload)) + payload


PING = frame(Opcode.PING, b"")


class Source(Protocol):
    """Something in progress whose outputs become messages. ``ended``: nothing more comes."""

    ended: bool

    def messages(self) -> list[dict]:
        """What can be said now; called in the output thread, must not block."""

    def abort(self, error: Exception) -> None:
        """End soon, and say why."""

    def cancel(self) -> None:
        """End; nobody listens any more."""


class Channel:
    """One connection, as its route sees it. Also what the output thread writes (``Frames``).

    Args:
        sock: the socket.
        parser: has read the opening handshake.
        max_message_bytes: longer messages end the connection.
    """

    def __init__(self, sock: socket.socket, parser: WSConnection, max_message_bytes: int) -> None:
        self._sock, self._parser, self._most = sock, parser, max_message_bytes
        # Of a message that is not complete.
        self._parts: list[str | bytes] = []
        self._size = 0
        self._lock = threading.Lock()
        self._queue: collections.deque[bytes] = collections.deque()
        self._sources: list[Source] = []
        self._told: tuple[Listener, object] | None = None
        self._closing: int | None = None
        self._gone = False
        self.draining = False
        self.ended = False
        self._ended_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    # For the route, in the request's thread

    def send(self, payload: dict) -> None:
        """Send a message; any thread."""
        self._put(frame(Opcode.TEXT, orjson.dumps(payload)))

    def add(self, source: Source) -> None:
        """Send what ``source`` says, until it has ended."""
        with self._lock:
            self._sources.append(source)
        self.wake()

    def follow(self, generation: Generation) -> None:
        """Wake up for the outputs of a generation, which a source will ask for."""
        assert self._told is not None, "the output thread has the channel"
        generation.notify(*self._told)

    @property
    def in_progress(self) -> list[Source]:
        """Sources that have not ended."""
        with self._lock:
            return list(self._sources)

    def end(self, reason: CloseReason = CloseReason.NORMAL_CLOSURE) -> None:
        """Close as soon as what is in progress has ended."""
        self._closing = self._closing or reason
        self.wake()

    def messages(self) -> Iterator[str | bytes]:
        """Messages as they come, until the connection ends, whoever ends it."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._ended_fd, select.POLLIN)
        while True:
            poller.poll()
            if self.ended:
                return
            try:
                data = self._sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                break
            try:
                self._parser.receive_data(data)
                yield from self._parsed()
            except RemoteProtocolError:
                self._cut(CloseReason.PROTOCOL_ERROR)
            if self._gone:
                return
        self.client_gone()

    def _parsed(self) -> Iterator[str | bytes]:
        """Whole messages out of what has been received; control frames are answered here."""
        parts = self._parts
        for event in self._parser.events():
            if isinstance(event, TextMessage | BytesMessage):
                parts.append(event.data)
                # A fragment counts too, or empty ones would be kept without end.
                self._size += len(event.data) + 1
                if self._size > self._most:
                    self._cut(CloseReason.MESSAGE_TOO_BIG)
                    return
                if event.message_finished:
                    message = type(parts[0])().join(parts)
                    parts.clear()
                    self._size = 0
                    yield message
            else:
                self._control(event)

    def _control(self, event: Event) -> None:
        if isinstance(event, Ping):
            self._put(frame(Opcode.PONG, bytes(event.payload)))
        elif isinstance(event, CloseConnection):
            # The client's close, or what the parser thinks of its frames.
            sayable = event.code not in (None, *LOCAL_ONLY_CLOSE_REASONS)
            self._cut(event.code if sayable else CloseReason.NORMAL_CLOSURE)

    def _put(self, data: bytes) -> None:
        self._queue.append(data)
        self.wake()

    def _cut(self, reason: int) -> None:
        """Close now; what is in progress is dropped."""
        self._closing, self._gone = reason, True
        self.close()
        self.wake()

    # For the output thread

    def notify(self, listener: Listener, name: object) -> None:
        self._told = listener, name
        listener([name])

    def wake(self) -> None:
        """There is something to send; any thread."""
        if self._told is not None:
            listener, name = self._told
            listener([name])

    def ready(self) -> bytes:
        """The frames that can be sent now."""
        parts = []
        while self._queue:
            parts.append(self._queue.popleft())
        for source in self.in_progress:
            parts += [frame(Opcode.TEXT, orjson.dumps(m)) for m in source.messages()]
            if source.ended:
                with self._lock:
                    self._sources.remove(source)
        if self._closing is not None and (self._gone or not self.in_progress):
            parts.append(frame(Opcode.CLOSE, struct.pack("!H", self._closing)))
            self._end()
        return b"".join(parts)

    def _end(self) -> None:
        """Nothing more is sent; whoever reads wakes up."""
        self.ended = True
        os.eventfd_write(self._ended_fd, 1)

    def client_gone(self) -> None:
        """Nobody reads any more."""
        self._gone = True
        self.close()
        if not self.ended:
            self._end()
        self.wake()

    def abort(self, error: Exception) -> None:
        """The server stops: what is in progress says so and ends."""
        for source in self.in_progress:
            source.abort(error)
        self.end(CloseReason.GOING_AWAY)

    def drain(self) -> None:
        """No new requests; close when those in progress have ended."""
        self.draining = True
        self.end(CloseReason.GOING_AWAY)

    def close(self) -> None:
        """Drop what is in progress."""
        for source in self.in_progress:
            source.cancel()

    def release(self) -> None:
        """Let go of everything; nobody uses the channel any more."""
        os.close(self._ended_fd)


class _Served(Response):
    """Stands for a connection that has been served to its end: gunicorn must write nothing."""

    def __call__(self, environ, start_response):
        self.close()
        raise StopIteration


def serve_websocket(route: Callable[[Channel], None]) -> Response:
    """Take over the current request's connection, and let ``route`` serve it.

    Raises:
        RequestError: the request is no sound opening handshake, comes from a page that is not
            allowed, or there are too many connections.
    """
    sock = _own_socket()
    access: Access = current_app.extensions["access"]
    if access.is_foreign(request):
        raise RequestError(
            "Pages of this origin may not use this server.",
            status=403,
            code="forbidden",
            type="permission_error",
        )
    lifecycle: Lifecycle = current_app.extensions["lifecycle"]
    parser = WSConnection(ConnectionType.SERVER)
    accepted = _handshake(parser)
    channel = Channel(sock, parser, current_app.config["MAX_CONTENT_LENGTH"])
    output: OutputThread = current_app.extensions["output_thread"]
    with contextlib.ExitStack() as guard:
        guard.callback(channel.release)
        guard.callback(channel.close)
        guard.enter_context(lifecycle.running(channel.abort, channel.drain))
        sock.sendall(accepted)
        done = output.attach(channel, sock, ping=PING)
        # The output thread has the socket until it lets go of it.
        guard.callback(done.wait, _END_WAIT_S)
        guard.callback(channel.client_gone)
        route(channel)
        channel.end()
        if not channel.ended:
            done.wait(_END_WAIT_S)
    return _Served(status=101)


def _own_socket() -> socket.socket:
    sock = client_socket()
    if sock is None or not OutputThread.can_write(sock):
        raise RequestError(
            "WebSockets need gunicorn without TLS; let a proxy do the encryption.",
            status=501,
            code="unsupported",
            type="server_error",
        )
    return sock


def _handshake(parser: WSConnection) -> bytes:
    """The bytes that accept the current request as the opening of a WebSocket."""
    headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in request.headers.items()]
    try:
        parser.initiate_upgrade_connection(headers, request.path.encode("ascii", "replace"))
        next(parser.events())
        extra = [(b"x-request-id", g.request_id.encode())]
        return parser.send(AcceptConnection(extra_headers=extra))
    except (RemoteProtocolError, UnicodeError) as error:
        raise RequestError(
            f"this is no opening of a WebSocket: {error}", code="invalid_request"
        ) from None
