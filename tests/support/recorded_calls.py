"""CUDA graphs without CUDA: what would be recorded is run again at every replay.

Everything but ``torch.cuda`` is real. Where a graph could not know of a change, neither does this:
a call that was recorded before ``invalidate`` refuses to run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["RecordedCalls"]


class RecordedCalls:
    """A GraphDevice on the CPU.

    Attributes:
        captures: how many calls were recorded;  fetched: copies begun;  read: copies awaited.
        fail_next: makes the next replay raise.
    """

    def __init__(self) -> None:
        self.captures = self.fetched = self.read = 0
        self.fail_next = False
        self._generation = 0

    def invalidate(self) -> None:
        """Something that recorded calls hold has been replaced."""
        self._generation += 1

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        self.captures += 1
        generation = self._generation

        def replay() -> None:
            assert generation == self._generation, "a stale graph is replayed"
            if self.fail_next:
                self.fail_next = False
                raise RuntimeError("scripted failure of a replay")
            function()

        return replay

    def fetch(self, tensor: torch.Tensor) -> Callable[[], list[float]]:
        held = tensor.flatten().to(torch.float64).clone()
        self.fetched += 1

        def wait() -> list[float]:
            self.read += 1
            return held.tolist()

        return wait

    def finish(self) -> None:
        pass

    def memory(self) -> int:
        return 0
