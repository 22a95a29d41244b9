"""Timing one call on a device: median over runs, operands rotated past the caches."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Timing", "TooLong", "copies_past_cache", "measure"]

_CACHE_BYTES = 256 * 1024 * 1024  # more than any cache that a kernel could find its operands in
_MAX_COPIES = 64
_MIN_RUNS = 5


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: ``median`` of ``runs``, between ``low`` and ``high`` (quartiles)."""

    median: float
    low: float
    high: float
    runs: int


class TooLong(Exception):
    """Timing a call would take ``seconds``, more than was allowed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"would take {seconds:,.0f} s")
        self.seconds = seconds


def copies_past_cache(nbytes: int) -> int:
    """Copies of an operand of ``nbytes`` to go round, so that none is in a cache when its turn
    comes."""
    return min(_MAX_COPIES, max(2, -(-_CACHE_BYTES // max(1, nbytes))))


def measure(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    *,
    seconds: float = 0.3,
    warmup: int = 3,
    limit: float = math.inf,
) -> Timing:
    """Time calls that differ in their operands only, in turn.

    Args:
        calls: one per copy of the operands.
        device: where they run; on CUDA each call is timed by a pair of events.
        seconds: about how long to measure; at least 5 runs.
        limit: seconds that warming up and measuring may take together.

    Raises:
        TooLong: a call after the first, which may have compiled, says that it would take longer.
    """
    turn = itertools.cycle(calls)
    run = _run_cuda if torch.device(device).type == "cuda" else _run_cpu
    warmup = max(2, warmup)
    for done in range(warmup):
        estimate = run(turn, 1)[0]
        least = estimate * (warmup + _MIN_RUNS)
        if done and least > limit:
            raise TooLong(least)
    times = run(turn, max(_MIN_RUNS, min(2000, int(seconds / max(estimate, 1e-6)))))
    low, _, high = statistics.quantiles(times, n=4)
    return Timing(statistics.median(times), low, high, len(times))


def _run_cpu(turn, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        call = next(turn)
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


def _run_cuda(turn, runs: int) -> list[float]:
    """Seconds on the device. A spin keeps the queue full, so that launching is not timed."""
    events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(runs)]
    torch.cuda._sleep(20_000_000)
    for start, end in events:
        call = next(turn)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]
