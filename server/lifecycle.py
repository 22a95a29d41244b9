"""What is in progress, and how it ends when the server must stop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from oxillama_torch.errors import EngineError, RequestError

__all__ = ["SPARE_THREADS", "Lifecycle"]

#: Threads beyond those of ``max_streams``: lists, uploads, downloads, and questions how it is.
SPARE_THREADS = 32
# Of these, those that nobody can hold who sends or reads slowly.
_FREE_THREADS = 8


class Lifecycle:
    """Requests in progress; thread-safe.

    Args:
        most: requests at once; None: no limit. The threads beyond answer ``/health`` and its like.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._seats = None
        if most is not None:
            self._seats = threading.BoundedSemaphore(most + SPARE_THREADS - _FREE_THREADS)
        self._aborts: dict[object, Callable[[Exception], None]] = {}
        self._drained: dict[object, Callable[[], None]] = {}
        self._changed = threading.Condition()
        self.draining = False
        #: Requests counted so far.
        self.started = 0

    @contextlib.contextmanager
    def running(
        self, abort: Callable[[Exception], None], drained: Callable[[], None] | None = None
    ) -> Iterator[None]:
        """Count a request for the duration of a block.

        Args:
            abort: called with an error, must end it soon.
            drained: called when no new requests are taken, for one that would not end by itself.

        Raises:
            RequestError: 503, as many as there may be are in progress.
        """
        key = object()
        with self._changed:
            if self._most is not None and len(self._aborts) >= self._most:
                raise _no_room(self._most)
            self._aborts[key] = abort
            if drained is not None:
                self._drained[key] = drained
            self.started += 1
        if drained is not None and self.draining:
            drained()
        try:
            yield
        finally:
            with self._changed:
                self._aborts.pop(key, None)
                self._drained.pop(key, None)
                self._changed.notify_all()

    def take_seat(self) -> Callable[[], None] | None:
        """Have a thread for a request, whatever it asks for; returns what gives it back.

        Raises:
            RequestError: 503, as ``running``.
        """
        if self._seats is None:
            return None
        if not self._seats.acquire(blocking=False):
            raise _no_room(self._most)
        return self._seats.release

    @property
    def in_progress(self) -> int:
        """Requests that are running."""
        return len(self._aborts)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        with self._changed:
            self.draining = True
            drained = list(self._drained.values())
        for tell in drained:
            tell()

    def resume(self) -> None:
        """Take requests again."""
        self.draining = False

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in progress; False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._aborts, timeout_s)

    def abort(self) -> None:
        """End everything in progress with an error that says why."""
        with self._changed:
            aborts = list(self._aborts.values())
        for abort in aborts:
            abort(EngineError("the server is shutting down"))


def _no_room(most: int | None) -> RequestError:
    return RequestError(
        f"{most} requests are in progress; there is no room for another",
        status=503,
        code="overloaded",
        type="server_error",
    )
