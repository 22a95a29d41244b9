"""KV pages by number: who holds which page, and which page is given out next. No torch here.

A page is in exactly one of three states:

    used    held by one or more requests (reference count of at least 1)
    cached  held by nobody, its content wanted by the prefix cache; given out last, oldest first
    free    held by nobody, content worthless; given out first
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable

__all__ = ["PageAllocator"]


class PageAllocator:
    """Hands out page numbers ``0 .. num_pages - 1`` with reference counts.

    Args:
        num_pages: how many pages exist.
        on_evict: called with a cached page whose content is about to be given up.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] | None = None) -> None:
        assert num_pages >= 1, f"a pool needs at least one page, got {num_pages}"
        self.num_pages = num_pages
        self.on_evict = on_evict
        #: Counts every page that became available; unchanged means: no more room than before.
        self.releases = 0
        #: How often each page was given out; unchanged means: its content still goes on.
        self.tenures = array("q", bytes(8 * num_pages))
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can give out: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages; cached ones are evicted, least recently used first."""
        assert count <= self.available, f"{count} pages asked for, {self.available} available"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                if self.on_evict is not None:
                    self.on_evict(page)
            self._references[page] = 1
            self.tenures[page] += 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """Hold a used or cached page once more."""
        if self._references[page] == 0:
            del self._cached[page]
        self._references[page] += 1

    def release(self, page: int, *, keep: bool = False) -> bool:
        """Give up one hold on a page; ``keep`` caches it when nobody holds it any more.

        Returns: whether that was the last hold.
        """
        assert self._references[page] > 0, f"page {page} is released but nobody holds it"
        self._references[page] -= 1
        if self._references[page]:
            return False
        self.releases += 1
        if keep:
            self._cached[page] = None
        else:
            self._free.append(page)
        return True

    def forget(self, page: int) -> None:
        """A cached page's content is no longer wanted: it becomes free."""
        if page in self._cached:
            del self._cached[page]
            self._free.append(page)
