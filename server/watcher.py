"""Notices clients that leave, also while nothing is being written to them.

One thread watches the sockets of all requests in progress. A half-closed connection counts as gone,
as it does for llama-server and ASGI servers.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
from collections.abc import Callable, Iterator

__all__ = ["DisconnectWatcher"]

log = logging.getLogger(__name__)

_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class DisconnectWatcher:
    """Calls back once per socket whose peer has gone. Thread-safe; its thread starts on use."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake_receive, self._wake_send = socket.socketpair()
        self._epoll.register(self._wake_receive.fileno(), select.EPOLLIN)

    @contextlib.contextmanager
    def watching(self, sock: socket.socket | None, gone: Callable[[], None]) -> Iterator[None]:
        """Watch ``sock`` for the duration of a block; ``None`` (no such socket) watches nothing."""
        if sock is None:
            yield
            return
        fd = sock.fileno()
        with self._lock:
            self._start()
            self._callbacks[fd] = gone
            # One shot: a peer that has gone would otherwise be reported without end.
            self._epoll.register(fd, _GONE | select.EPOLLONESHOT)
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.pop(fd, None)
                with contextlib.suppress(OSError):
                    self._epoll.unregister(fd)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="disconnects", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._wake_receive.fileno():
                    return
                with self._lock:
                    gone = self._callbacks.pop(fd, None)
                if gone is not None:
                    gone()

    def close(self) -> None:
        """Stop the thread; nothing is watched any more."""
        if self._thread is not None:
            self._wake_send.send(b"x")
            self._thread.join()
        self._epoll.close()
        self._wake_receive.close()
        self._wake_send.close()
