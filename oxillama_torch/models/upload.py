"""Bytes of a file on their way to the device, while the device repacks those that came before.

A copy from the file's own memory would wait for the host, and run behind everything the device has
been told to do. So the host fills a pinned buffer, the device takes it on a stream of its own, and
the host fills the other buffer meanwhile. What repacks the bytes waits for them on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["CHUNK_BYTES", "CudaLane", "Lane", "Uploader", "uploader"]

CHUNK_BYTES = 64 << 20
_BUFFERS = 2


class Lane(Protocol):
    """What uploading needs of ``torch.cuda``."""

    def staging(self, size: int) -> torch.Tensor:
        """uint8 [size] on the host, from where the device copies by itself."""

    def empty(self, size: int) -> torch.Tensor:
        """uint8 [size] on the device, for this lane to write."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        """Begin to copy on this lane. Returns: waits until ``source`` may be written again."""

    def join(self, tensor: torch.Tensor) -> None:
        """What is launched from here on, on the current stream, finds ``tensor`` filled."""

    def close(self) -> None:
        """Give back the memory that is kept for more uploads."""


class CudaLane:
    """A stream beside the current one.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def staging(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, size: int) -> torch.Tensor:
        # Memory of the lane's own stream: that of the current one would have to be waited for.
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
        done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            done.record()
        return done.synchronize

    def join(self, tensor: torch.Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)

    def close(self) -> None:
        torch.cuda.empty_cache()


class Uploader:
    """Copies tensors through a few buffers.

    Args:
        lane: where copies run.
        chunk_bytes: size of a buffer.
    """

    def __init__(self, lane: Lane, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._lane, self._chunk = lane, chunk_bytes
        self._buffers: list[tuple[torch.Tensor, Callable[[], None]]] = []
        self._turns = itertools.cycle(range(_BUFFERS))

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 [n] on the host -> the same on the device, for the current stream to use."""
        out = self._lane.empty(len(data))
        for start in range(0, len(data), self._chunk):
            part = data[start : start + self._chunk]
            turn = next(self._turns)
            if turn == len(self._buffers):
                self._buffers.append((self._lane.staging(self._chunk), lambda: None))
            buffer, wait = self._buffers[turn]
            wait()
            staged = buffer[: len(part)].copy_(part)
            self._buffers[turn] = buffer, self._lane.copy(out[start : start + len(part)], staged)
        self._lane.join(out)
        return out

    def close(self) -> None:
        """Wait for what is under way and give the buffers back."""
        for _, wait in self._buffers:
            wait()
        self._buffers.clear()
        self._lane.close()


def uploader(device: torch.device) -> Uploader | None:
    """The way to a device; None where there is nothing to copy."""
    return Uploader(CudaLane(device)) if device.type == "cuda" else None
