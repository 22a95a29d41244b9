"""Drives an Engine in the test's own thread and sorts its events by request."""

from __future__ import annotations

from collections import defaultdict

from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import (
    Event,
    FinishEvent,
    GenerationRequest,
    RequestHandle,
    TokenEvent,
)
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["Driver", "request_for", "tokens_of"]


def request_for(
    prompt, *, priority=0, deadline=None, cache_salt="", capture=None, pooling=None, **params
):
    """A greedy request unless ``params`` say otherwise."""
    params.setdefault("temperature", 0)
    params.setdefault("seed", 0)
    return GenerationRequest(
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        priority=priority,
        deadline=deadline,
        cache_salt=cache_salt,
        capture=capture,
        pooling=pooling,
    )


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, TokenEvent)]


class Driver:
    """An engine, stepped by hand."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: dict[str, list[Event]] = defaultdict(list)

    def add(self, request: GenerationRequest) -> str:
        self.engine.check(request)
        matcher = self.engine.matcher(request)
        adapters = self.engine.resolve(request)
        self.engine.add(RequestHandle(request, lambda _: None, adapters=adapters, matcher=matcher))
        return request.request_id

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._keep(self.engine.step())

    def cancel(self, request_id: str) -> None:
        self._keep(self.engine.cancel(request_id))

    def run(self, *requests: GenerationRequest, limit: int = 5000) -> list[list[Event]]:
        """Add requests, run until nothing is left, return their events."""
        ids = [self.add(request) for request in requests]
        while self.engine.has_work:
            self.step()
            limit -= 1
            assert limit, "requests do not come to an end"
        return [self.events[request_id] for request_id in ids]

    def _keep(self, deliveries) -> None:
        for handle, event in deliveries:
            seen = self.events[handle.request_id]
            assert not (seen and isinstance(seen[-1], FinishEvent)), "an event after the last one"
            seen.append(event)
