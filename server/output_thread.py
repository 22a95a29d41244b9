"""One thread that writes the events of all streams to their sockets.

A thread per stream that is woken for every token spends its time on waking: at a thousand streams
one writing thread delivers several times as many events and leaves the batching thread alone.

The thread sleeps in epoll until the batching thread has events (an eventfd) or a slow socket takes
bytes again. What a socket does not take waits in a bounded buffer; a reader that stays behind
loses its own stream, and nobody waits for it.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

from oxillama_torch.server import sse
from oxillama_torch.server.event_stream import Frames

__all__ = ["OutputThread"]

log = logging.getLogger(__name__)

_BUFFER_BYTES = 1024 * 1024
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class _Stream:
    """One stream being written."""

    __slots__ = (
        "backlog", "blocked_since", "chunked", "done", "events", "fd", "known", "last_write",
        "over", "ping", "sock",
    )  # fmt: skip

    def __init__(
        self, events: Frames, sock: socket.socket, chunked: bool, ping: bytes = sse.PING
    ) -> None:
        self.events, self.sock, self.fd = events, sock, sock.fileno()
        self.chunked, self.ping = chunked, ping
        # What the socket did not take.
        self.backlog = bytearray()
        self.blocked_since: float | None = None
        self.last_write = time.monotonic()
        # Told to others by ``done``; here because what is far apart in memory is slow to reach.
        self.known = self.over = False
        self.done = threading.Event()

    def framed(self, data: bytes) -> bytes:
        """Bytes framed as the response is."""
        return b"%X\r\n%b\r\n" % (len(data), data) if self.chunked and data else data


class OutputThread:
    """Writes streams until it is closed; its thread starts on first use.

    Args:
        ping_interval_s: a stream that is silent for so long gets a comment.
        send_timeout_s: a socket that takes nothing for so long is given up.
    """

    def __init__(self, ping_interval_s: float, send_timeout_s: float) -> None:
        self.ping_interval_s = ping_interval_s
        self._send_timeout_s = send_timeout_s
        self._epoll = select.epoll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._noted: collections.deque[list[_Stream]] = collections.deque()
        self._asleep = False
        self._now = time.monotonic()
        self._streams: dict[int, _Stream] = {}
        self._thread: threading.Thread | None = None
        self._start_lock = threading.Lock()
        self._closing = False
        self._next_check = 0.0

    @staticmethod
    def can_write(sock: socket.socket) -> bool:
        """Whether bytes put on ``sock`` reach the client as they are."""
        return not isinstance(sock, ssl.SSLSocket)

    def write(self, events: Frames, sock: socket.socket, *, chunked: bool) -> None:
        """Write a stream to its end; returns when it has ended, or its client has gone.

        Args:
            events: what to write.
            sock: nothing else may write to it meanwhile.
            chunked: frame as HTTP/1.1 chunks (the last, empty one is the server's).
        """
        self._attach(_Stream(events, sock, chunked)).wait()

    def attach(self, events: Frames, sock: socket.socket, *, ping: bytes) -> threading.Event:
        """As ``write``, with another ping, but does not wait: the event says that it has ended."""
        return self._attach(_Stream(events, sock, False, ping))

    def _attach(self, stream: _Stream) -> threading.Event:
        self._start()
        stream.events.notify(self._note, stream)
        return stream.done

    def _note(self, streams: list[_Stream]) -> None:
        """Remember that streams have events (any thread); those of a step come in one list."""
        self._noted.append(streams)
        if self._asleep:
            self._asleep = False
            os.eventfd_write(self._wake_fd, 1)

    def _start(self) -> None:
        with self._start_lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="output", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            # Before looking: whoever notes something from here on wakes the thread.
            self._asleep = True
            events = self._epoll.poll(0 if self._noted else self._pause_s())
            self._asleep = False
            self._now = time.monotonic()
            for fd, _ in events:
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                elif fd in self._streams:
                    self._each(self._resume, [self._streams[fd]])
            # Not until there are none: slow sockets and pings have their turn too.
            for _ in range(len(self._noted)):
                self._each(self._take, self._noted.popleft())
            self._check()

    def _each(self, step: Callable[[_Stream], None], streams: list[_Stream]) -> None:
        """Take a step with each of some streams. A bug in one must not end the others."""
        for stream in streams:
            try:
                step(stream)
            except Exception:
                log.exception("a stream failed in the output thread")
                self._give_up(stream)

    def _take(self, stream: _Stream) -> None:
        """Send what the stream has to say, behind what its socket did not take before."""
        if stream.over:
            return
        if not stream.known:
            stream.known = True
            self._streams[stream.fd] = stream
        data = stream.framed(stream.events.ready())
        if stream.blocked_since is None:
            self._send(stream, data)
        else:
            stream.backlog += data
            if len(stream.backlog) > _BUFFER_BYTES:
                self._give_up(stream)

    def _resume(self, stream: _Stream) -> None:
        """The socket of a blocked stream takes bytes again, or has failed."""
        backlog, stream.backlog = stream.backlog, bytearray()
        self._send(stream, backlog)

    def _send(self, stream: _Stream, data: bytes | bytearray) -> None:
        """Put bytes on the socket; what it does not take becomes the backlog."""
        sent = 0
        if data:
            try:
                sent = stream.sock.send(data, _SEND_FLAGS)
                stream.last_write = self._now
            except BlockingIOError:
                pass
            except OSError:
                self._give_up(stream)
                return
        if sent < len(data):
            stream.backlog += data[sent:]
            self._block(stream, progress=sent > 0)
            return
        if stream.blocked_since is not None:
            self._unblock(stream)
        if stream.events.ended:
            self._finish(stream)

    def _block(self, stream: _Stream, progress: bool) -> None:
        if stream.blocked_since is None:
            stream.blocked_since = self._now
            self._epoll.register(stream.fd, select.EPOLLOUT)
        elif progress:
            stream.blocked_since = self._now

    def _unblock(self, stream: _Stream) -> None:
        stream.blocked_since = None
        self._epoll.unregister(stream.fd)

    def _give_up(self, stream: _Stream) -> None:
        """The client does not read, or has gone: end the request and cut the connection."""
        stream.events.client_gone()
        with contextlib.suppress(OSError):
            stream.sock.shutdown(socket.SHUT_RDWR)
        self._finish(stream)

    def _finish(self, stream: _Stream) -> None:
        if stream.blocked_since is not None:
            with contextlib.suppress(OSError):
                self._unblock(stream)
        self._streams.pop(stream.fd, None)
        stream.over = True
        stream.done.set()

    def _pause_s(self) -> float:
        return max(0.0, self._next_check - time.monotonic()) if self._streams else -1

    def _check(self) -> None:
        """Now and then: pings for silent streams, the end for blocked ones."""
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + min(1.0, self.ping_interval_s / 2)
        for stream in list(self._streams.values()):
            if stream.blocked_since is not None:
                if now - stream.blocked_since > self._send_timeout_s:
                    self._give_up(stream)
            elif now - stream.last_write >= self.ping_interval_s:
                self._each(self._ping, [stream])

    def _ping(self, stream: _Stream) -> None:
        self._send(stream, stream.framed(stream.ping))

    def close(self) -> None:
        """Stop the thread; streams in progress end."""
        if self._thread is not None:
            self._closing = True
            os.eventfd_write(self._wake_fd, 1)
            self._thread.join()
            for stream in list(self._streams.values()):
                self._give_up(stream)
        self._epoll.close()
        os.close(self._wake_fd)
