"""Requests, events and handles: the messages between front doors and the batching thread.

Everything here is plain data (token ids, numbers, arrays): no text, no tokenizer, no torch, so that
the engine could run in another process without a change to its callers.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from oxillama_torch.engine.outbox import Outbox, deliver
from oxillama_torch.errors import EngineError
from oxillama_torch.sampling.params import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    import numpy

    from oxillama_torch.lora.registry import LoadedAdapter
    from oxillama_torch.sampling.constraint_matcher import Matcher

__all__ = [
    "Capture",
    "ErrorEvent",
    "Event",
    "FinishEvent",
    "FinishReason",
    "GenerationRequest",
    "Pooling",
    "PromptEvent",
    "RequestHandle",
    "TokenEvent",
    "TokenLogprobs",
]

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
Capture = Literal["logits", "hidden"]
Pooling = Literal["last", "first", "mean", "max"]

_ids = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt to be continued once (``params.n`` is the front door's business).

    Args:
        prompt_token_ids: the prompt; at least one id.
        params: sampling parameters with ``seed`` already chosen.
        request_id: unique in the process.
        adapters: (adapter name, scale) pairs, part of the prefix-cache key.
        cache_salt: separates prefix caches of tenants.
        deadline: ``time.monotonic()`` after which the request ends with reason ``deadline``.
        priority: lower runs first; equal ones in order of arrival.
        capture: also return the ``logits`` or the final ``hidden`` states of every prompt token.
        pooling: with ``hidden``: return one row made of them all, an embedding.
    """

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    request_id: str = field(default_factory=lambda: f"req-{next(_ids)}")
    adapters: tuple[tuple[str, float], ...] = ()
    cache_salt: str = ""
    deadline: float | None = None
    priority: int = 0
    capture: Capture | None = None
    pooling: Pooling | None = None
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Sent once, before the first token: what the prompt cost and, if asked for, its logprobs.

    ``logprobs[0]`` is None: nothing precedes the first token. ``captured`` is float32
    [prompt tokens, vocabulary or hidden size], as ``GenerationRequest.capture`` asked for; one row
    with ``pooling``.
    """

    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    captured: numpy.ndarray | None = None


# Not frozen, which would quadruple its cost: one is made per token.
@dataclass(slots=True)
class TokenEvent:
    """One generated token; an end-of-generation token too, which a text leaves out."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The end of a request that was served. Always the last event."""

    reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The end of a request that failed. Always the last event."""

    error: Exception


Event = PromptEvent | TokenEvent | FinishEvent | ErrorEvent


class RequestHandle:
    """The caller's end of a submitted request: iterate it for events, or ``cancel()`` it.

    Its events go to ``outbox``, by default one of its own. ``adapters`` are the versions that the
    request's adapters had when it was submitted, ``matcher`` watches over its constraint.
    """

    __slots__ = ("_cancel", "adapters", "matcher", "outbox", "request", "request_id")

    def __init__(
        self,
        request: GenerationRequest,
        cancel: Callable[[str], None],
        outbox: Outbox | None = None,
        adapters: tuple[tuple[LoadedAdapter, float], ...] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.request, self.adapters, self.matcher = request, adapters, matcher
        self.request_id = request.request_id
        self.outbox = Outbox() if outbox is None else outbox
        self._cancel = cancel

    def put(self, event: Event) -> None:
        """Deliver an event (batching thread only)."""
        deliver([(self, event)])

    def next_event(self, timeout_s: float | None = None) -> Event:
        """Wait for one event, with an outbox of its own.

        Raises ``queue.Empty`` after ``timeout_s`` seconds.
        """
        return self.outbox.get(timeout_s)[1]

    def events(self) -> Iterator[Event]:
        """All events up to and including the last one; raises the error of an ErrorEvent."""
        while True:
            event = self.next_event()
            if isinstance(event, ErrorEvent):
                raise event.error if isinstance(event.error, Exception) else EngineError("failed")
            yield event
            if isinstance(event, FinishEvent):
                return

    def cancel(self) -> None:
        """Ask the engine to drop the request; idempotent, callable from any thread."""
        self._cancel(self.request_id)
