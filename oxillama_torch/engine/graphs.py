"""CUDA graphs of decode steps: sizes, capture, replay; and copies to the host that are not awaited.

A graph is a list of kernels with all their arguments, launched as one. It is recorded once for each
number of lines, and holds the addresses of everything it reads: weights, pages, lines. Whoever puts
other tensors in their place must drop the graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from oxillama_torch.engine.adapter_lines import AdapterShape

__all__ = ["CudaGraphs", "GraphDevice", "StepShape", "line_counts", "reaches"]

#: Contexts up to which graphs are made besides the longest: one for long contexts splits keys among
#: programs that short ones leave idle.
_REACHES = (2048, 16384)
#: Copies to the host that may be under way at once.
_COPIES = 4


class StepShape(NamedTuple):
    """What a graph is made for.

    Args:
        part: ``step``, or where a mask comes in between ``forward`` and then ``choose``.
        lines: how many.
        reach: most tokens of a line; 0 where it does not matter.
        penalised, masked: see ``DecodeStep.choose``.
        adapters: what some lines have; None: none has any.
    """

    part: str
    lines: int
    reach: int = 0
    penalised: bool = False
    masked: bool = False
    adapters: AdapterShape | None = None


def line_counts(most: int) -> list[int]:
    """Numbers of lines that graphs are made for: 1, 2, 4, 8, then steps of 8 up to ``most``."""
    sizes = [size for size in (1, 2, 4) if size < most]
    return [*sizes, *range(8, most, 8), most]


def reaches(max_context: int) -> list[int]:
    """Contexts that graphs are made for, the longest last."""
    return [*(reach for reach in _REACHES if reach < max_context), max_context]


class GraphDevice(Protocol):
    """What decoding needs of ``torch.cuda``."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what ``function`` launches. Returns: launches it again, on the current stream."""

    def fetch(self, tensor: torch.Tensor) -> Callable[[], list[float]]:
        """Begin to copy to the host. Returns: waits for the copy and says what it holds."""

    def finish(self) -> None:
        """Wait until nothing runs: what a graph stands on may be taken away afterwards."""

    def memory(self) -> int:
        """Bytes that captured graphs take, weights and lines not counted."""


class CudaGraphs:
    """Graphs that share one pool of memory: only one of them runs at a time.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._copies = itertools.cycle([_Copy() for _ in range(_COPIES)])
        self._bytes = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run ``function`` once (kernels are chosen and compiled, tables made), then record it."""
        free = torch.cuda.mem_get_info(self._device)[0]
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load adapters meanwhile: what they allocate is none of this.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            function()
        self._bytes += max(free - torch.cuda.mem_get_info(self._device)[0], 0)
        return graph.replay

    def fetch(self, tensor: torch.Tensor) -> Callable[[], list[float]]:
        return next(self._copies).start(tensor)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)

    def memory(self) -> int:
        return self._bytes


class _Copy:
    """Pinned memory for one copy at a time."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float64)
        self._done = torch.cuda.Event()

    def start(self, tensor: torch.Tensor) -> Callable[[], list[float]]:
        self._done.synchronize()
        size = tensor.numel()
        if len(self._memory) < size:
            self._memory = torch.empty(2 * size, dtype=torch.float64, pin_memory=True)
        self._memory[:size].copy_(tensor.flatten(), non_blocking=True)
        self._done.record()

        def wait() -> list[float]:
            self._done.synchronize()
            return self._memory[:size].tolist()

        return wait
