"""Responses in progress: one thread turns the outputs of all of them into events.

What a response produced is stored before its last event is sent. The thread does not wait for
that: the store tells it when the commit is done.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import orjson

from oxillama_torch.errors import EngineError, OxiLlamaError
from oxillama_torch.server.errors import code_of, told
from oxillama_torch.server.output import Generation
from oxillama_torch.server.responses.builder import Event, ResponseBuilder
from oxillama_torch.server.responses.event_log import EventLog
from oxillama_torch.server.store.errors import StoreError

__all__ = ["ResponseJob", "ResponseRunner"]

log = logging.getLogger(__name__)

_RETRY_S = 2.0
# What a response says of its end before there is one.
_NOT_ENDED = {
    "status": "in_progress",
    "completed_at": None,
    "error": None,
    "incomplete_details": None,
    "usage": None,
}

Save = Callable[["ResponseJob"], Future]


class _Cancelled(Exception):  # noqa: N818 (an order, not an error)
    """Somebody has cancelled the response."""


class ResponseJob:
    """One response in progress.

    Args:
        builder: makes its events.
        generation: makes its outputs.
        save: stores it when it has ended; None: it is not stored.
        log: takes its events; None: nobody reads them.
        patient: it has been acknowledged, so a store that is full or away is waited for.
    """

    def __init__(
        self,
        builder: ResponseBuilder,
        generation: Generation,
        save: Save | None,
        log: EventLog | None,
        *,
        patient: bool = False,
    ) -> None:
        self.builder, self.generation = builder, generation
        self.log, self._save, self._patient = log, save, patient
        self._saved: Future | None = None
        self._ended = False
        # Held while the response changes.
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.noted = False
        self.error: Exception | None = None

    @property
    def id(self) -> str:
        return self.builder.response["id"]

    def cancel(self) -> None:
        """End soon, as cancelled; idempotent, callable from any thread."""
        self.generation.abort(_Cancelled())

    def abort(self, error: Exception) -> None:
        """End soon, as failed."""
        self.generation.abort(error)

    def events(self) -> bytes:
        """All events of a response that has ended, its last one too, one a line."""
        assert self.log is not None, "events of background responses are kept"
        last = orjson.dumps(self.builder.last_event())
        return b"\n".join([*self.log.take(0), last])

    def snapshot(self) -> dict[str, Any]:
        """The response as it stands. An end that a crash could take back is not told yet."""
        with self.lock:
            response = orjson.loads(orjson.dumps(self.builder.response))
            if self._ended and self._save is not None and not self.done.is_set():
                response |= _NOT_ENDED
        return response

    def step(self, note: Callable[[], None]) -> bool:
        """Take what has come (the runner's thread only); ``note`` has it called again.

        Returns:
            Whether the store did not take the response: to be called again after a while.
        """
        with self.lock:
            # The engine's own end may come after a stop string's.
            if self.done.is_set():
                return False
            if not self._ended:
                self._produce()
                self._ended = self.builder.concluded
            refused = self._ended and not self._stored(note)
        if self.log is not None:
            self.log.wake()
        return refused

    def _stored(self, note: Callable[[], None]) -> bool:
        """Have the response stored, and conclude when it is; False when it is to be tried again."""
        if self._save is None:
            self._conclude(None)
        elif self._saved is None:
            self._saved = self._save(self)
            self._saved.add_done_callback(lambda _: note())
        elif self._saved.done():
            error = self._saved.exception()
            if self._patient and isinstance(error, StoreError):
                self._saved = None
                return False
            self._conclude(error)
        return True

    def open(self) -> None:
        """Emit the first events."""
        with self.lock:
            self._emit(self.builder.open())

    def _produce(self) -> None:
        try:
            for output in self.generation.poll():
                self._emit(self.builder.add(output))
            if self.generation.finished:
                self._emit(self.builder.finish())
        except _Cancelled:
            self._emit(self.builder.cancel())
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not isinstance(error, OxiLlamaError):
            log.exception("response %s failed", self.id)
        self.error = error
        self.generation.cancel()
        self.generation.meter.errors.append(code_of(error))
        self._emit(self.builder.fail(error))

    def _conclude(self, error: BaseException | None) -> None:
        """Send the last event. What could not be stored has failed, whatever was generated."""
        if error is not None:
            self.error = told(error)
            self._emit(self.builder.fail(self.error))
        self._emit([self.builder.last_event()])
        self.generation.meter.close()
        # Before the last event leaves: whoever has it may build on the response at once.
        self.done.set()
        if self.log is not None:
            self.log.close()

    def _emit(self, events: Iterable[Event]) -> None:
        for event in events:
            if self.log is not None:
                self.log.append(orjson.dumps(event))

    def drop(self) -> None:
        """The server stops: end without a last word.

        A background response is taken up at the next start.
        """
        self.error = EngineError("the server is shutting down")
        self.generation.cancel()
        if self.log is not None:
            self.log.close()
        self.done.set()


class ResponseRunner:
    """Runs jobs; its thread starts on first use."""

    def __init__(self) -> None:
        self._jobs: dict[str, ResponseJob] = {}
        self._noted: queue.SimpleQueue[ResponseJob | None] = queue.SimpleQueue()
        # Jobs that the store has refused.
        self._refused: list[ResponseJob] = []
        self._retry_at = 0.0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, job: ResponseJob) -> None:
        """Begin to take a job's outputs."""
        job.open()
        with self._lock:
            if self._closed:
                job.drop()
                return
            self._jobs[job.id] = job
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="responses", daemon=True)
                self._thread.start()
        job.generation.notify(self._note, job)

    def find(self, response_id: str) -> ResponseJob | None:
        """The job of a response in progress."""
        with self._lock:
            return self._jobs.get(response_id)

    def _note(self, jobs: list[ResponseJob]) -> None:
        """Remember that jobs have something to take (any thread)."""
        for job in jobs:
            if not job.noted:
                job.noted = True
                self._noted.put(job)

    def _run(self) -> None:
        while True:
            if self._refused and time.monotonic() >= self._retry_at:
                self._note(self._refused)
                self._refused.clear()
            try:
                job = self._noted.get(timeout=_RETRY_S if self._refused else None)
            except queue.Empty:
                continue
            if job is None:
                return
            # Before reading: what comes now notes the job again.
            job.noted = False
            self._step(job)

    def _step(self, job: ResponseJob) -> None:
        try:
            if job.step(lambda: self._note([job])):
                self._refused.append(job)
                self._retry_at = time.monotonic() + _RETRY_S
        except Exception:
            log.exception("response %s cannot go on", job.id)
            job.drop()
        if job.done.is_set():
            with self._lock:
                # A run that was answered at once has a new job by now.
                if self._jobs.get(job.id) is job:
                    del self._jobs[job.id]

    def close(self) -> None:
        """Stop; responses in progress end."""
        with self._lock:
            self._closed = True
            jobs, thread = list(self._jobs.values()), self._thread
        if thread is not None:
            self._noted.put(None)
            thread.join()
        for job in jobs:
            with contextlib.suppress(Exception):
                job.drop()
