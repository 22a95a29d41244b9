"""The tensors behind host page numbers, and the copies between them and the pool.

Shapes: P pages, H host pages, S tokens per page, Hkv key/value heads, R elements of a head; n pages
of one piece of a copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oxillama_torch.config import EngineConfig
from oxillama_torch.errors import EngineError
from oxillama_torch.kernels.kv_formats import raw
from oxillama_torch.kvcache.swap import PageCopy, runs

__all__ = ["HostPages", "plan_host_pages"]

_DEFAULT_BYTES = 4 << 30
#: Pages that one piece of a copy has at most: bounds the staging buffer on a GPU.
_PIECE = 64


def plan_host_pages(config: EngineConfig, bytes_per_page: int, num_pages: int) -> int:
    """How many host pages to allocate.

    Args:
        config: ``preemption`` and ``swap_memory_bytes``.
        bytes_per_page: as ``pool.page_bytes`` says.
        num_pages: P.

    Returns: 0 where preempted requests are computed again.

    Raises:
        EngineError: the memory does not hold a single page.
    """
    if config.preemption == "recompute":
        return 0
    budget = config.swap_memory_bytes
    if budget is None:
        budget = min(num_pages * bytes_per_page, _DEFAULT_BYTES)
    count = budget // max(bytes_per_page, 1)
    if count < 1:
        raise EngineError(
            f"no memory for swapped pages: one takes {bytes_per_page} bytes, "
            f"swap_memory_bytes is {budget}"
        )
    return count


class HostPages:
    """Copies of pages in host memory, pinned where the pool is on a GPU.

    A GPU copies through a staging buffer there, so that what crosses the bus is in one piece per
    plane. Copies and steps are ordered by the stream they share: nobody waits.

    Args:
        planes: [P, S, Hkv, R] each, of any dtypes: what a page consists of.
        num_pages: H.
    """

    def __init__(self, planes: Sequence[Tensor], num_pages: int) -> None:
        self._planes = [raw(plane) for plane in planes]
        self._device = planes[0].device
        on_gpu = self._device.type == "cuda"
        self._host = [
            torch.empty((num_pages, *plane.shape[1:]), dtype=plane.dtype, pin_memory=on_gpu)
            for plane in self._planes
        ]
        largest = max(plane[0].nbytes for plane in self._planes)
        self._staging = (
            torch.empty(_PIECE * largest, dtype=torch.uint8, device=self._device)
            if on_gpu
            else None
        )

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(plane.nbytes for plane in self._host)

    def save(self, copy: PageCopy) -> None:
        """Pages of the pool into host pages."""
        for first, pages in runs(copy, _PIECE):
            index = self._index(pages)
            for plane, host in zip(self._planes, self._host):
                target = host[first : first + len(pages)]
                if self._staging is None:
                    torch.index_select(plane, 0, index, out=target)
                else:
                    staged = self._staged(target)
                    torch.index_select(plane, 0, index, out=staged)
                    target.copy_(staged, non_blocking=True)

    def restore(self, copy: PageCopy) -> None:
        """Host pages into pages of the pool."""
        for first, pages in runs(copy, _PIECE):
            index = self._index(pages)
            for plane, host in zip(self._planes, self._host):
                source = host[first : first + len(pages)]
                if self._staging is not None:
                    source = self._staged(source).copy_(source, non_blocking=True)
                plane.index_copy_(0, index, source)

    def _index(self, pages: Sequence[int]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self._device)

    def _staged(self, like: Tensor) -> Tensor:
        """The staging buffer as a tensor [n, S, Hkv, R]."""
        return self._staging[: like.nbytes].view(like.dtype).view(like.shape)
