"""The batching thread: sole owner of the model, fed through a bounded inbox.

Every other thread only submits, cancels and reads figures. Events leave through each request's
handle, all those of a step in one go. An exception that concerns one request ends that request; one
that escapes a step ends the thread, and everybody who waits is told.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

import torch

from oxillama_torch.engine.engine import Engine, on_device
from oxillama_torch.engine.outbox import Delivery, Outbox, deliver
from oxillama_torch.engine.request import ErrorEvent, GenerationRequest, Pooling, RequestHandle
from oxillama_torch.errors import CapacityError, EngineError, RequestError
from oxillama_torch.lora.registry import AdapterRegistry
from oxillama_torch.sampling.philox import random_seed

__all__ = ["EngineThread"]

_MAX_RETRY_AFTER_S = 60.0
_RATE_WINDOW = 64

log = logging.getLogger(__name__)

T = TypeVar("T")


class EngineThread:
    """Runs an engine in a thread of its own.

    Args:
        engine: nobody else may use it from now on.
        inbox_size: requests that may wait to run; beyond it CapacityError.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        inbox_size: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._inbox_size, self._clock = engine, inbox_size, clock
        self._wake = threading.Condition()
        self._inbox: deque[RequestHandle] = deque()
        self._cancelled: list[str] = []
        self._calls: deque[tuple[Callable[[Engine], Any], Future]] = deque()
        self._draining = False
        self._stopping = False
        self._closed: str | None = None
        self._ended: deque[tuple[float, int]] = deque(maxlen=_RATE_WINDOW)
        self._step_started: float | None = None
        self._thread = threading.Thread(target=self._run, name="oxillama-engine", daemon=True)

    @property
    def max_context(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self._engine.max_context

    @property
    def vocab_size(self) -> int:
        return self._engine.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of an embedding."""
        return self._engine.model.config.hidden_size

    @property
    def pooling(self) -> Pooling:
        """What makes an embedding where a request does not say, by the model's file."""
        return self._engine.model.config.pooling

    @property
    def adapters(self) -> AdapterRegistry | None:
        """Adapters that requests may name; any thread may load and drop them."""
        return self._engine.adapters

    @property
    def alive(self) -> bool:
        """Whether requests are being served."""
        return self._closed is None and self._thread.is_alive()

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def stop(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Stop serving; idempotent.

        Args:
            drain: finish what has been submitted first; otherwise it ends as ``cancelled``.
            timeout_s: wait this long for the thread; None: as long as it takes.
        """
        with self._wake:
            self._draining = True
            self._stopping = self._stopping or not drain
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def submit(self, request: GenerationRequest, outbox: Outbox | None = None) -> RequestHandle:
        """Hand in a request; callable from any thread.

        Args:
            request: a request that has no seed gets one, see ``handle.request``.
            outbox: where its events go, with those of other requests; None: one of its own.

        Raises:
            RequestError: it can never be served.
            CapacityError: too many are waiting.
            EngineError: the engine does not run.
        """
        self._check_open()  # before a constraint is compiled for nothing
        self._engine.check(request)
        if request.params.seed is None:
            request = replace(request, params=replace(request.params, seed=random_seed()))
        engine = self._engine
        request = engine.tokenized(request)
        adapters, matcher = engine.resolve(request), engine.matcher(request)
        handle = RequestHandle(request, self.cancel, outbox, adapters, matcher)
        with self._wake:
            self._check_open()
            if self._knows(request.request_id):
                raise RequestError(
                    f"request id {request.request_id!r} is in use", param="request_id"
                )
            waiting = len(self._inbox) + self._engine.waiting
            if waiting >= self._inbox_size:
                raise CapacityError(
                    f"{waiting} requests are waiting already",
                    retry_after_s=self._retry_after_s(waiting),
                )
            self._inbox.append(handle)
            self._wake.notify()
        return handle

    def _check_open(self) -> None:
        if self._closed is not None:
            raise EngineError(self._closed)
        if self._draining or not self._thread.is_alive():
            raise EngineError("the engine is not running")

    def cancel(self, request_id: str) -> None:
        """Drop a request within a step; callable from any thread, unknown ids are ignored."""
        with self._wake:
            self._cancelled.append(request_id)
            self._wake.notify()

    def call(self, function: Callable[[Engine], T]) -> T:
        """Run ``function(engine)`` in the batching thread between two steps; wait for its result.

        Every running request waits too: prepare what takes long beforehand. Not to be called from
        the batching thread, such as from a listener.

        Raises:
            EngineError: the engine does not run.
            whatever ``function`` raises.
        """
        assert threading.current_thread() is not self._thread, "it would wait for itself"
        future: Future[T] = Future()
        with self._wake:
            if self._closed is not None or not self._thread.is_alive():
                raise EngineError(self._closed or "the engine is not running")
            self._calls.append((function, future))
            self._wake.notify()
        return future.result()

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges of the engine; ``step_age_s`` is above 0 while a step runs."""
        started = self._step_started
        return {
            **self._engine.stats(),
            "waiting": self._engine.waiting + len(self._inbox),
            "alive": int(self.alive),
            "step_age_s": 0.0 if started is None else self._clock() - started,
        }

    def _run(self) -> None:
        try:
            with torch.inference_mode(), on_device(self._engine.model.device):
                while self._receive():
                    self._step_started = self._clock()
                    self._deliver(self._engine.step())
                    self._step_started = None
            self._close("the engine has been stopped")
        except BaseException:
            log.critical("the engine thread has died", exc_info=True)
            self._step_started = None
            self._close("the engine has died")

    def _knows(self, request_id: str) -> bool:
        in_inbox = any(handle.request_id == request_id for handle in self._inbox)
        return in_inbox or request_id in self._engine

    def _receive(self) -> bool:
        """Take in requests and cancellations; blocks while there is nothing to do.

        Returns: False when it is time to end.
        """
        with self._wake:
            while not (
                self._inbox
                or self._cancelled
                or self._calls
                or self._engine.has_work
                or self._draining
            ):
                self._wake.wait()
                # The rate of requests served is measured while there are some.
                self._ended.clear()
            refused = []
            while self._inbox:
                refused += self._take_in(self._inbox[0])
                self._inbox.popleft()
            cancelled, self._cancelled = self._cancelled, []
            calls = len(self._calls)
            stopping = self._stopping
        self._deliver(refused)
        for _ in range(calls):
            # One by one: where a call ends the thread, those behind it are told.
            self._answer(*self._calls.popleft())
        for request_id in cancelled:
            self._deliver(self._engine.cancel(request_id))
        if stopping:
            for request_id in self._engine.request_ids():
                self._deliver(self._engine.cancel(request_id))
        return self._engine.has_work or not self._draining

    def _take_in(self, handle: RequestHandle) -> list[Delivery]:
        """Give a request to the engine. Returns: what is to be said to one it cannot take."""
        try:
            self._engine.add(handle)
        except Exception as error:
            log.exception("request %s could not be taken in", handle.request_id)
            failure = EngineError("the engine could not take this request in")
            failure.__cause__ = error
            return [(handle, ErrorEvent(failure))]
        return []

    def _answer(self, function: Callable[[Engine], Any], future: Future) -> None:
        """Run a call; what it raises is its caller's, unless it takes the device with it."""
        try:
            future.set_result(function(self._engine))
        except BaseException as error:
            future.set_exception(error)
            if isinstance(error, torch.AcceleratorError) or not isinstance(error, Exception):
                raise

    def _deliver(self, events: list[Delivery]) -> None:
        """Hand events out, and keep count of the requests that have ended."""
        deliver(events)
        if not self._ended or self._ended[-1][1] != self._engine.completed:
            self._ended.append((self._clock(), self._engine.completed))

    def _close(self, reason: str) -> None:
        """Nothing is served any more: tell everybody who waits."""
        with self._wake:
            self._closed = reason
            handles = [*self._engine.drop_all(), *self._inbox]
            self._inbox.clear()
            calls, self._calls = self._calls, deque()
        for _, future in calls:
            future.set_exception(EngineError(reason))
        # An error each: raised in several threads, one object would collect all their tracebacks.
        unique = {handle.request_id: handle for handle in handles}
        self._deliver([(handle, ErrorEvent(EngineError(reason))) for handle in unique.values()])

    def _retry_after_s(self, waiting: int) -> float:
        """Time in which half of those who wait will have gone, at the rate seen lately."""
        if len(self._ended) < 2:
            return 1.0
        (since, before), (until, now) = self._ended[0], self._ended[-1]
        if until <= since:
            return 1.0
        rate = (now - before) / (until - since)
        return min(max(waiting / 2 / rate, 1.0), _MAX_RETRY_AFTER_S)
