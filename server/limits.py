"""Limits per key: requests and tokens per minute, as token buckets that fill all the time."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from oxillama_torch.errors import RequestError

__all__ = ["Allowance", "Limiter", "Limits", "RateLimited"]

# Holders of buckets that are remembered; a forgotten one starts with full buckets.
_MOST_HOLDERS = 10_000


class RateLimited(RequestError):
    """A key has used up what it may per minute.

    Args:
        kind: ``requests`` or ``tokens``, OpenAI's error type.
    """

    def __init__(self, kind: str, limit: int, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            f"Rate limit reached: {limit} {kind} per minute. "
            f"Please try again in {_duration(retry_after_s)}.",
            status=429,
            code="rate_limit_exceeded",
            type=kind,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """Per minute; None: no limit."""

    requests: int | None = None
    tokens: int | None = None


class _Bucket:
    """Holds up to a minute's worth. May go below zero: tokens are counted once they are made."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.limit, self._rate = per_minute, per_minute / 60
        self._level, self._at = float(per_minute), now

    def level(self, now: float) -> float:
        # A clock that stands still or goes back must not take anything away.
        passed = max(now - self._at, 0.0)
        self._level = min(self._level + passed * self._rate, float(self.limit))
        self._at = max(now, self._at)
        return self._level

    def take(self, amount: float) -> None:
        self._level -= amount

    def seconds_until(self, wanted: float) -> float:
        return max(0.0, (wanted - self._level) / self._rate)


class Allowance:
    """What one holder (a key, or a peer where there are no keys) may still do. Thread-safe."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets = {
            kind: _Bucket(limit, clock())
            for kind, limit in (("requests", limits.requests), ("tokens", limits.tokens))
            if limit is not None
        }

    def admit(self) -> None:
        """Take one request; what refuses it takes nothing.

        Raises:
            RateLimited: no request is left, or earlier ones have used up the tokens.
        """
        with self._lock:
            now = self._clock()
            for kind, bucket in self._buckets.items():
                if bucket.level(now) < 1:
                    raise RateLimited(kind, bucket.limit, bucket.seconds_until(1))
            if (requests := self._buckets.get("requests")) is not None:
                requests.take(1)

    def give_back(self) -> None:
        """Undo one ``admit``."""
        with self._lock:
            if (requests := self._buckets.get("requests")) is not None:
                requests.take(-1)

    def charge(self, tokens: int) -> None:
        """Take the tokens of a request, prompt and answer."""
        bucket = self._buckets.get("tokens")
        if bucket is not None and tokens:
            with self._lock:
                bucket.level(self._clock())
                bucket.take(tokens)

    def headers(self) -> dict[str, str]:
        """``x-ratelimit-*`` as OpenAI has them."""
        headers = {}
        with self._lock:
            now = self._clock()
            for kind, bucket in self._buckets.items():
                level = bucket.level(now)
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(level)))
                headers[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until(bucket.limit))
        return headers


class Limiter:
    """Allowances of everybody who asked lately. Thread-safe.

    Args:
        default: for holders without limits of their own.
    """

    def __init__(self, default: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._default, self._clock = default, clock
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, Limits], Allowance] = OrderedDict()

    def allowance(self, holder: str, limits: Limits | None = None) -> Allowance:
        """The allowance of ``holder``; other ``limits`` than before begin with full buckets."""
        key = (holder, limits or self._default)
        with self._lock:
            found = self._held.get(key)
            if found is None:
                found = self._held[key] = Allowance(key[1], self._clock)
                if len(self._held) > _MOST_HOLDERS:
                    self._held.popitem(last=False)
            else:
                self._held.move_to_end(key)
            return found


def _duration(seconds: float) -> str:
    """Such as ``1s``, ``6m0s`` or ``120ms``."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
