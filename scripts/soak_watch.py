"""Memory, threads, open files and engine figures of a soak, sampled and fitted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import psutil

__all__ = ["Sample", "Watch", "slope_per_hour"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a process and its engine.

    Args:
        at: seconds since the start.
        rss: bytes, children included.
        threads, files: likewise.
        figures: what the engine counts.
    """

    at: float
    rss: int
    threads: int
    files: int
    figures: Mapping[str, float]


class Watch:
    """Samples processes until it is stopped.

    Args:
        processes: name -> (process id, function that gives its engine's figures).
        interval_s: between two samples.
    """

    def __init__(
        self,
        processes: Mapping[str, tuple[int, Callable[[], Mapping[str, float]]]],
        interval_s: float,
    ) -> None:
        self._processes = {
            name: (psutil.Process(pid), figures) for name, (pid, figures) in processes.items()
        }
        self._interval_s = interval_s
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.samples: dict[str, list[Sample]] = {name: [] for name in processes}
        self.error: Exception | None = None

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def look(self) -> None:
        """Take one sample of every process."""
        for name, (process, figures) in self._processes.items():
            tree = [process, *process.children(recursive=True)]
            sample = Sample(
                time.monotonic() - self._started,
                sum(one.memory_info().rss for one in tree),
                sum(one.num_threads() for one in tree),
                sum(one.num_fds() for one in tree),
                figures(),
            )
            self.samples[name].append(sample)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.look()
            except (psutil.Error, OSError) as error:
                self.error = error
                return
            self._over.wait(self._interval_s)


def slope_per_hour(samples: list[Sample], skip: float = 0.25) -> tuple[float, float]:
    """Straight line through the resident memory, the first ``skip`` of the time left out.

    Returns: (MiB per hour, its standard error).
    """
    kept = [s for s in samples if s.at >= samples[0].at + skip * (samples[-1].at - samples[0].at)]
    if len(kept) < 4:
        return float("nan"), float("nan")
    hours = np.array([s.at for s in kept]) / 3600
    sizes = np.array([s.rss for s in kept]) / _MIB
    (slope, _), covariance = np.polyfit(hours, sizes, 1, cov=True)
    return float(slope), float(np.sqrt(covariance[0, 0]))
