"""Host memory for pages of preempted requests, by number. No torch here.

Host pages are as large as those of the pool and hold the same bytes: what comes back is what went.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["PageCopy", "SwapSpace", "SwappedPages", "runs"]


@dataclass(slots=True)
class SwappedPages:
    """What one preempted request has in host memory.

    Args:
        slots: host pages, in order of position.
        tokens: so many leading tokens have their keys and values there.
        shared: whether the prefix cache may know these pages; not when the model has changed since.
    """

    slots: list[int]
    tokens: int
    shared: bool


@dataclass(frozen=True, slots=True)
class PageCopy:
    """``pages`` of the pool and ``slots`` of host memory, as many of each, to be copied."""

    pages: tuple[int, ...]
    slots: tuple[int, ...]


class SwapSpace:
    """Hands out host pages ``0 .. num_pages - 1``, the lowest first.

    Args:
        num_pages: how many there are.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))

    @property
    def used(self) -> int:
        return self.num_pages - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """``count`` host pages in ascending order; None: there are not so many."""
        if count > len(self._free):
            return None
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, slots: Sequence[int]) -> None:
        """Make host pages available again."""
        self._free = sorted([*self._free, *slots])


def runs(copy: PageCopy, longest: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """A copy in pieces whose host pages lie side by side.

    Args:
        copy: what is to be copied.
        longest: most pages of a piece.

    Returns: (first host page, pages of the pool) piece by piece.
    """
    start = 0
    for end in range(1, len(copy.slots) + 1):
        first = copy.slots[start]
        follows = end < len(copy.slots) and copy.slots[end] == first + end - start
        if not follows or end - start == longest:
            yield first, copy.pages[start:end]
            start = end
