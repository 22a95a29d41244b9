"""A run at work: what the generation makes becomes events, and rows before the last of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

import orjson

from oxillama_torch.errors import CapacityError, OxiLlamaError, RequestError
from oxillama_torch.server.assistants.builder import Event, RunBuilder
from oxillama_torch.server.assistants.objects import Object
from oxillama_torch.server.assistants.records import end_run, save
from oxillama_torch.server.errors import code_of, envelope, told
from oxillama_torch.server.output import Generation
from oxillama_torch.server.responses.event_log import EventLog, LogStream
from oxillama_torch.server.store.errors import StoreError
from oxillama_torch.server.store.store import Store

__all__ = ["DONE", "RunJob", "RunStream", "frame", "last_error_of"]

log = logging.getLogger(__name__)

DONE = b"event: done\ndata: [DONE]\n\n"


class _Cancelled(Exception):  # noqa: N818 (an order, not an error)
    """Somebody has cancelled the run."""


class RunStream(LogStream):
    """A reader of a run's events, which lie in the log as frames."""

    def ready(self) -> bytes:
        """The frames that can be sent now."""
        return b"" if self.ended else b"".join(self.lines())


class RunJob:
    """One turn of a run; has the face of ``responses.runner.ResponseJob``.

    Args:
        first: events that come before the builder's own.
        events: takes the frames; None: nobody reads them.
    """

    def __init__(
        self,
        builder: RunBuilder,
        generation: Generation,
        store: Store,
        first: Iterable[Event],
        events: EventLog | None,
    ) -> None:
        self.builder, self.generation = builder, generation
        self._store, self._log = store, events
        self._first = list(first)
        # What is said once the end is stored; None: it goes on.
        self._last: list[Event] | None = None
        self._saved: Future | None = None
        # Why the end as it was cannot be stored, whatever the store's state.
        self._unwritable: OxiLlamaError | None = None
        # Everything that the turn has changed, as it stands.
        self._changed: dict[str, Object] = {}
        self._cancelled = False
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.noted = False

    @property
    def id(self) -> str:
        return self.builder.run["id"]

    def cancel(self) -> None:
        """End soon, as cancelled; idempotent, callable from any thread."""
        self._cancelled = True
        self.generation.abort(_Cancelled())

    def abort(self, error: Exception) -> None:
        """End soon, as failed."""
        self.generation.abort(error)

    def open(self) -> None:
        """Emit the first events."""
        self._emit(self._first)
        self._emit(self.builder.open())
        self._submit()

    def step(self, note: Callable[[], None]) -> bool:
        """Take what has come (the runner's thread only); ``note`` has it called again.

        Returns:
            Whether the store did not take the run's end: to be called again after a while.
        """
        refused = False
        with self.lock:
            if self.done.is_set():
                return False
            if self._last is None:
                self._produce()
            if self._last is not None:
                refused = not self._stored(note)
        if self._log is not None:
            self._log.wake()
        return refused

    def _stored(self, note: Callable[[], None]) -> bool:
        """Have the run's end stored, and conclude when it is; False when it is to be tried again.

        The run was acknowledged, so it must end there too: a store that is full or away is waited
        for, and what it can never take ends as failed. Whoever reads the events is told at once.
        """
        if self._saved is None:
            self._write_end(note)
        elif self._saved.done():
            error = self._saved.exception()
            if isinstance(error, StoreError):
                self._say_last([("error", envelope(error)["error"])])
                self._saved = None
                return False
            if error is not None and self._unwritable is None:
                self._give_up(error)
                self._write_end(note)
            else:
                self._conclude(error)
        return True

    def _write_end(self, note: Callable[[], None]) -> None:
        failed = self._unwritable
        if failed is None:
            self._saved = self._submit()
        else:
            self._saved = self._store.submit(
                lambda session: end_run(session, self.id, "failed", last_error_of(failed))
            )
        self._saved.add_done_callback(lambda _: note())

    def _give_up(self, error: BaseException) -> None:
        """The store has refused the end for good: fail there with what it holds."""
        log.error("run %s cannot be stored", self.id, exc_info=error)
        known = told(error)
        self.generation.meter.errors.append(code_of(known))
        self._unwritable, self._last = known, [("error", envelope(known)["error"])]

    def _produce(self) -> None:
        try:
            for output in self.generation.poll():
                self._emit(self.builder.add(output))
            if not self.generation.finished:
                if self.builder.changed:
                    self._submit()
                return
            # The order to cancel may have come when there was nothing left to cancel.
            self._last = list(
                self.builder.end("cancelled") if self._cancelled else self.builder.finish()
            )
        except _Cancelled:
            self._last = list(self.builder.end("cancelled"))
        except Exception as error:
            self._last = list(self._failed(error))

    def _failed(self, error: Exception) -> Iterable[Event]:
        self.generation.cancel()
        if isinstance(error, RequestError) and error.code == "timeout":
            return self.builder.end("expired")
        if not isinstance(error, OxiLlamaError):
            log.error("run %s failed", self.id, exc_info=error)
        self.generation.meter.errors.append(code_of(error))
        return self.builder.end("failed", last_error_of(error))

    def _submit(self) -> Future:
        """Have the store write what has changed; at the end all of it: a write may have failed."""
        changed = orjson.loads(orjson.dumps(self.builder.changed))
        self._changed |= {data["id"]: data for data in changed}
        if self._last is not None:
            changed = list(self._changed.values())
        usage = dict(self.builder.usage)
        self.builder.changed = []
        return self._store.submit(lambda session: save(session, changed, usage))

    def _conclude(self, error: BaseException | None) -> None:
        """Send the last events. What could not be stored did not happen."""
        if error is not None:  # not even that: the next start marks the run
            log.error("run %s cannot be marked as failed", self.id, exc_info=error)
        self._close(self._last)

    def drop(self) -> None:
        """The server stops: end without a last word. The next start marks the run."""
        self.generation.cancel()
        self._close([])

    def _close(self, last: Iterable[Event]) -> None:
        self._say_last(last)
        self.generation.meter.close()
        self.done.set()

    def _say_last(self, events: Iterable[Event]) -> None:
        """Emit them and end the stream, once."""
        if self._log is not None:
            self._emit(events)
            self._log.append(DONE)
            self._log.close()
            self._log = None

    def _emit(self, events: Iterable[Event]) -> None:
        for name, data in events:
            if self._log is not None:
                self._log.append(frame(name, data))


def frame(name: str, data: Object) -> bytes:
    """One event of a run as it goes over the wire."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps(data))


def last_error_of(error: Exception) -> Object:
    """``last_error`` of a run that has met an error."""
    code = "server_error"
    if isinstance(error, CapacityError):
        code = "rate_limit_exceeded"
    elif isinstance(error, RequestError) and error.status < 500:
        code = "invalid_prompt"
    return {"code": code, "message": envelope(error)["error"]["message"]}
