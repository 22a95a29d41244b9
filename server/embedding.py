"""The engine requests behind one request for embeddings, a bounded number of them at a time."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from oxillama_torch.engine.outbox import Outbox
from oxillama_torch.engine.request import (
    ErrorEvent,
    Event,
    FinishEvent,
    GenerationRequest,
    Pooling,
    PromptEvent,
    RequestHandle,
)
from oxillama_torch.errors import CapacityError, EngineError, RequestError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.output import ClientGone
from oxillama_torch.server.priority import current_priority
from oxillama_torch.server.service import Service

__all__ = ["Embedded", "Embedding", "unit_length"]

# Inputs of one HTTP request that stand at the engine at once: two thousand of them must not fill
# the inbox that everybody else uses.
_WINDOW = 32
_RETRY_S = 0.05

_NO_TOKENS = SamplingParams(max_tokens=0, temperature=0, seed=0)


@dataclass(frozen=True, slots=True)
class Embedded:
    """An input that is done.

    Args:
        index: of the input.
        rows: float32 [1, hidden size]; without pooling [tokens, hidden size].
    """

    index: int
    rows: np.ndarray
    prompt_tokens: int


def unit_length(rows: np.ndarray) -> np.ndarray:
    """Rows divided by their Euclidean length; zeros stay zeros."""
    length = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    return (rows / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)


class Embedding:
    """Embeds inputs; has the face of ``output.Generation`` for whoever ends it from outside.

    Args:
        service: the model.
        prompts: token ids of each input.
        pooling: None: the hidden states of all tokens.
        deadline: ``time.monotonic()`` at which it ends, or None.
        adapters: (name, scale) pairs.

    Raises:
        RequestError: an input that cannot be served.
        CapacityError: there is no room for the first one.
    """

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Sequence[int]],
        pooling: Pooling | None,
        deadline: float | None = None,
        adapters: tuple[tuple[str, float], ...] = (),
    ) -> None:
        self._service, self._pooling = service, pooling
        self._deadline, self._adapters = deadline, adapters
        self._priority = current_priority()
        self._waiting = deque(enumerate(prompts))
        self._open: dict[int, RequestHandle] = {}
        self._outbox = Outbox()
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._end_with: Exception | None = None
        self._begun = False
        try:
            self._submit_some()
        except BaseException:
            self.cancel()
            raise
        self._begun = True

    def cancel(self) -> None:
        """Drop what is not done; idempotent, callable from any thread."""
        self.abort(EngineError("the request was cancelled"))

    def abort(self, error: Exception) -> None:
        """As cancel, and the reading thread gets ``error``."""
        with self._lock:
            self._end_with = self._end_with or error
            for handle in self._open.values():
                handle.cancel()
        self._outbox.put(None)

    def client_gone(self) -> None:
        """The client has left: whoever reads outputs gets ClientGone."""
        self.abort(ClientGone())

    def outputs(self) -> Iterator[Embedded]:
        """Inputs in the order in which they are done.

        Raises:
            the error of an input that failed; ClientGone. The caller cancels what is left.
        """
        rows: dict[int, PromptEvent] = {}
        while self._open or self._waiting:
            for index, event in self._next():
                if isinstance(event, PromptEvent):
                    rows[index] = event
                elif isinstance(event, FinishEvent | ErrorEvent):
                    self._end(index, event)
                    done = rows.pop(index)
                    yield Embedded(index, done.captured, done.prompt_tokens)
            self._submit_some()

    def _next(self) -> list[tuple[int, Event]]:
        """The next event; none after a while when nothing of ours is at the engine."""
        try:
            delivery = self._outbox.get(None if self._open else _RETRY_S)
        except queue.Empty:
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise _too_late() from None
            return []
        if self._end_with is not None:
            raise self._end_with
        assert delivery is not None, "only abort wakes without an event"
        handle, event = delivery
        return [(self._numbers[handle.request_id], event)]

    def _end(self, index: int, event: FinishEvent | ErrorEvent) -> None:
        with self._lock:
            del self._open[index]
        if isinstance(event, ErrorEvent):
            raise event.error
        if event.reason == "deadline":
            raise _too_late()
        if event.reason == "cancelled":
            raise self._end_with or EngineError("the engine has been stopped")

    def _submit_some(self) -> None:
        """Submit until the window or the engine's inbox is full."""
        while self._waiting and len(self._open) < _WINDOW:
            index, prompt = self._waiting[0]
            request = GenerationRequest(
                prompt_token_ids=tuple(prompt),
                params=_NO_TOKENS,
                capture="hidden",
                pooling=self._pooling,
                deadline=self._deadline,
                adapters=self._adapters,
                priority=self._priority,
            )
            with self._lock:
                if self._end_with is not None:
                    raise self._end_with
                try:
                    self._open[index] = self._submit(index, request)
                except CapacityError:
                    if self._open or self._begun:
                        return
                    raise
            self._waiting.popleft()

    def _submit(self, index: int, request: GenerationRequest) -> RequestHandle:
        self._numbers[request.request_id] = index
        return self._service.engine.submit(request, self._outbox)


def _too_late() -> RequestError:
    return RequestError("the request took too long", status=408, code="timeout", param=None)
