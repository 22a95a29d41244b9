"""The events of one response: written once, read by a stream, and for background ones by many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from oxillama_torch.engine.outbox import Listener
from oxillama_torch.server import sse

__all__ = ["EventLog", "LogStream"]


class EventLog:
    """Events as JSON lines; an event's ``sequence_number`` is its place. Thread-safe.

    Args:
        keep: for readers that come later; otherwise what has been read is dropped.
        lines: what is there already.
    """

    def __init__(self, *, keep: bool, lines: list[bytes] | None = None) -> None:
        self._keep = keep
        self._lines = lines if lines is not None else []
        self._dropped = 0
        self._listeners: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self.closed = False

    def append(self, line: bytes) -> None:
        """Add an event. Readers are told by ``wake``."""
        with self._lock:
            self._lines.append(line)

    def close(self) -> None:
        """The last event is there."""
        self.closed = True
        self.wake()

    def wake(self) -> None:
        """Tell readers that there is something new."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called, at once and whenever there is something new."""
        with self._lock:
            self._listeners.append(listener)
        listener()

    def forget(self, listener: Callable[[], None]) -> None:
        """Undo ``listen``."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def take(self, start: int) -> list[bytes]:
        """Events from the ``start``-th on."""
        with self._lock:
            lines = self._lines[max(0, start - self._dropped) :]
            if not self._keep:
                self._dropped += len(self._lines)
                self._lines = []
        return lines


class LogStream:
    """A reader of a log, as the output thread and generators want it.

    Args:
        start: the ``sequence_number`` to begin with.
        gone: called when the client has left.
        abort: called with the reason when the server must end the stream.
    """

    def __init__(
        self,
        log: EventLog,
        *,
        start: int = 0,
        gone: Callable[[], None],
        abort: Callable[[Exception], None],
    ) -> None:
        self._log, self._next = log, start
        self._gone, self.abort = gone, abort
        self._tell: Callable[[], None] | None = None
        self._news = threading.Event()
        self.ended = False

    def notify(self, listener: Listener, name: object) -> None:
        """Have ``listener`` called with ``[name]``, at once and when ``ready`` has something."""
        self._tell = lambda: listener([name])
        self._log.listen(self._tell)

    def client_gone(self) -> None:
        """Nobody reads any more."""
        self.close()
        # Whoever waits learns that it has ended.
        if self._tell is not None:
            self._tell()

    def close(self) -> None:
        """Stop listening; a reader that has not come to the end has gone."""
        if self._tell is not None:
            self._log.forget(self._tell)
        if not self.ended:
            self.ended = True
            self._gone()

    def lines(self) -> list[bytes]:
        """The events that have come since the last call, as JSON."""
        closed = self._log.closed
        lines = self._log.take(self._next)
        self._next += len(lines)
        self.ended = self.ended or closed
        return lines

    def ready(self) -> bytes:
        """The frames that can be sent now."""
        return b"" if self.ended else b"".join(map(sse.named_frame, self.lines()))

    def frames(self, ping_interval_s: float) -> Iterator[bytes]:
        """All frames as they come, with a ping after each silent interval."""
        self.notify(lambda _: self._news.set(), None)
        while not self.ended:
            if not self._news.wait(ping_interval_s):
                yield sse.PING
            self._news.clear()
            if data := self.ready():
                yield data
