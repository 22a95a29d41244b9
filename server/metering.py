"""What one HTTP request or WebSocket message costs: tokens, and the times between them."""

from __future__ import annotations

import time
from bisect import bisect_left

from flask import g, has_app_context

from oxillama_torch.server.limits import Allowance
from oxillama_torch.server.metrics import GAP_BOUNDS_S, Metrics

__all__ = ["Meter", "current_meter"]


class Meter:
    """Counts while outputs are made; ``close`` adds it up. One thread at a time counts.

    Nothing here is shared while tokens flow: a lock per token would be felt by every stream.

    Args:
        metrics: where the sums go; None: nowhere.
        allowance: what the tokens are charged to, or None.
    """

    __slots__ = (
        "_first_tokens", "_gap_seconds", "_gaps", "_metrics", "allowance", "cached_tokens",
        "completion_tokens", "errors", "model", "prompt_tokens", "started",
    )  # fmt: skip

    def __init__(self, metrics: Metrics | None = None, allowance: Allowance | None = None) -> None:
        self._metrics, self.allowance = metrics, allowance
        self._gaps = [0] * (len(GAP_BOUNDS_S) + 1)
        self._gap_seconds = 0.0
        self._first_tokens: list[float] = []
        self.started = time.perf_counter()
        self.model: str | None = None
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        #: Errors that were told inside a stream, by code.
        self.errors: list[str] = []

    def prompt(self, tokens: int, cached: int) -> None:
        """A prompt has been read."""
        self.prompt_tokens += tokens
        self.cached_tokens += cached

    def tokens(self, count: int, last: float | None, now: float) -> None:
        """A choice has got tokens now, and the one before at ``last`` (``time.perf_counter``)."""
        if last is None:
            self._first_tokens.append(now - self.started)
        else:
            self._gaps[bisect_left(GAP_BOUNDS_S, now - last)] += 1
            self._gap_seconds += now - last
        # Between those that came together no time has passed.
        self._gaps[0] += count - 1
        self.completion_tokens += count

    def add(self, other: Meter) -> None:
        """Add the tokens of a part to those of the whole, which says what it cost."""
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens

    @property
    def seconds(self) -> float:
        """Time since the request came."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """Book what was counted, once."""
        if self.allowance is not None:
            self.allowance.charge(self.prompt_tokens + self.completion_tokens)
        if self._metrics is not None:
            self._metrics.book(self._first_tokens, self._gaps, self._gap_seconds, self.errors)
        self._metrics = self.allowance = None


def current_meter() -> Meter:
    """The meter of the request that this thread serves; elsewhere one that nobody reads."""
    return g.meter if has_app_context() and "meter" in g else Meter()
