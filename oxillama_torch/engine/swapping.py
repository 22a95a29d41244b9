"""Which pages of preempted requests go to host memory and come back. No torch here.

Instead of computing prompt and output again, a preempted request may find its keys and values where
it left them. The scheduler preempts and admits as ever; this books the copies, which the runner
makes before the step: all that go out, then all that come in. A page that goes out may be given to
another request in the same step, a host page that is freed by coming in is not, for within a step
nobody is preempted once somebody has been admitted.

Where host memory is full, the request is computed again, and counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from oxillama_torch.engine.state import RequestState
from oxillama_torch.kvcache.holdings import PageManager
from oxillama_torch.kvcache.swap import PageCopy, SwappedPages, SwapSpace

__all__ = ["Swapping"]


class Swapping:
    """Host pages of the requests that were preempted.

    Args:
        pages: the pool's.
        space: host pages.

    Attributes:
        saved, restored: requests that went out and came back.
        refused: requests for which there was no room, and which were computed again.
    """

    def __init__(self, pages: PageManager, space: SwapSpace) -> None:
        self._pages, self.space = pages, space
        self.saved = self.restored = self.refused = 0
        self._out: list[PageCopy] = []
        self._in: list[PageCopy] = []

    def save(self, state: RequestState) -> None:
        """Keep what a request has computed; called before its pages are given back."""
        count = self._pages.pages_for(state.computed)
        if not count:
            return
        slots = self.space.take(count)
        if slots is None:
            self.refused += 1
            return
        self.saved += 1
        held = state.held
        # Without a tail, its pages are those of other weights or kernels than the cache's.
        shared = self._pages.prefix is None or held.tail is not None
        state.swapped = SwappedPages(slots, state.computed, shared)
        self._out.append(PageCopy(tuple(held.pages[:count]), tuple(slots)))

    def restore(self, state: RequestState) -> None:
        """Bring back what the prefix cache did not have; called when pages have been taken."""
        swapped, held = state.swapped, state.held
        first = state.computed // self._pages.page_size
        if first < len(swapped.slots):
            pages = held.pages[first : len(swapped.slots)]
            self._in.append(PageCopy(tuple(pages), tuple(swapped.slots[first:])))
            state.computed = swapped.tokens
        if not swapped.shared:
            held.tail = None
        self.restored += 1
        self.drop(state)

    def drop(self, state: RequestState) -> None:
        """Forget what a request has in host memory, if anything."""
        if state.swapped is not None:
            self.space.give_back(state.swapped.slots)
            state.swapped = None

    def forget(self, states: Iterable[RequestState]) -> None:
        """Keys and values are computed differently from now on: keep old ones out of the cache."""
        for state in states:
            if state.swapped is not None:
                state.swapped.shared = False

    def stats(self) -> dict[str, int]:
        """Counters and gauges for ``Engine.stats``."""
        return {
            "swap_pages": self.space.num_pages,
            "swap_pages_used": self.space.used,
            "swapped_out": self.saved,
            "swapped_in": self.restored,
            "swap_refused": self.refused,
        }

    def copies(self) -> tuple[tuple[PageCopy, ...], tuple[PageCopy, ...]]:
        """What is to be copied (out, in) since this was last asked."""
        out, back = tuple(self._out), tuple(self._in)
        self._out, self._in = [], []
        return out, back
