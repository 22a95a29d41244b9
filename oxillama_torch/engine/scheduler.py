"""Which requests run in the next step, how many tokens of each, and in which pages. No torch here.

One token budget covers a step. In order:

    0. where a request of higher priority waits in vain, the latest one of lower priority gives way
    1. requests with a single token to compute (decode), so that no running stream waits for a
       prompt; there are never more running requests than tokens in the budget, so all of them fit
    2. requests with several new tokens (a grammar left no choice), then prompts in progress: a
       chunk each, by priority and arrival
    3. waiting requests, by priority and arrival, as long as budget, places and pages last; the
       first that does not fit keeps those behind it waiting, so that nobody is overtaken for ever

A request gets the pages for everything it knows when it is admitted; only decoding takes more. When
there are none, the latest of the running requests (lowest priority first) is preempted: its pages
are freed, its tokens kept, and it computes prompt and output again once it is back, or finds what
it had computed in host memory (``swapping``). No request may need more pages than exist
(``Scheduler.max_context``), so the first in line always gets on.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

from oxillama_torch.engine.request import FinishReason
from oxillama_torch.engine.state import RequestState, ScheduledBatch, ScheduledItem
from oxillama_torch.engine.swapping import Swapping
from oxillama_torch.kvcache.holdings import PageManager

__all__ = ["Scheduler"]


def _sort_key(state: RequestState) -> tuple[int, float, int]:
    return state.sort_key


class Scheduler:
    """Owns the order of requests and their pages.

    Args:
        pages: where pages come from.
        max_batch_size: most requests running at once.
        max_batch_tokens: token budget of one step.
        max_context: most tokens of one request; cut to what all pages together hold.
        swapping: keeps what preempted requests have computed; None: it is computed again.

    Attributes:
        waiting, running: requests in order of (priority, arrival).
        preemptions, prefix_hit_tokens: counted since the start.
    """

    def __init__(
        self,
        pages: PageManager,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_context: int,
        swapping: Swapping | None = None,
    ) -> None:
        self.pages, self.swapping = pages, swapping
        self.max_batch_tokens = max_batch_tokens
        self.max_running = min(max_batch_size, max_batch_tokens)
        self.max_context = min(max_context, pages.allocator.num_pages * pages.page_size)
        self.waiting: list[RequestState] = []
        self.running: list[RequestState] = []
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self._slots = list(range(self.max_running - 1, -1, -1))
        self._refused: tuple[RequestState, int, int] | None = None

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        assert len(state.token_ids) <= self.max_context, "the prompt's length is checked earlier"
        bisect.insort(self.waiting, state, key=_sort_key)

    def remove(self, state: RequestState) -> None:
        """Drop a request wherever it stands; its pages are free at once."""
        if state.slot is None:
            self.waiting.remove(state)
            if self.swapping is not None:
                self.swapping.drop(state)
        else:
            self._leave(state)
            self.pages.give_back(state.held)

    def discard(self, state: RequestState) -> list[int]:
        """Drop a running request whose pages may hold NaN.

        Returns: pages to clear before they are used again.
        """
        self._leave(state)
        return self.pages.discard(state.held)

    def stats(self) -> dict[str, int]:
        """Counters and gauges for ``Engine.stats``."""
        pages = self.pages.allocator
        return {
            "running": len(self.running),
            "waiting": len(self.waiting),
            "pages": pages.num_pages,
            "pages_used": pages.used,
            "pages_cached": pages.cached,
            "pages_free": pages.free,
            "page_size": self.pages.page_size,
            "prefix_hit_tokens": self.prefix_hit_tokens,
            "preemptions": self.preemptions,
            **(self.swapping.stats() if self.swapping is not None else {}),
        }

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: from now on, keys and values are computed differently."""
        self.pages.forget(state.held for state in self.running)
        if self.swapping is not None:
            self.swapping.forget(self.waiting)

    def schedule(self) -> ScheduledBatch:
        """Decide one step. The caller computes it and hands it to ``postprocess``."""
        displaced = self._make_way()
        preempted: list[RequestState] = []
        items = self._decodes(preempted)
        budget = self.max_batch_tokens - len(items)
        for state in sorted(self.running, key=lambda s: s.computed < s.prompt_tokens):
            if budget and state.pending > 1:
                items.append(ScheduledItem(state, state.computed, min(state.pending, budget)))
                budget -= items[-1].count
        # What was preempted a moment ago must not take back the page it was preempted for.
        while budget and not preempted and (state := self._admit()) is not None:
            items.append(ScheduledItem(state, state.computed, min(state.pending, budget)))
            budget -= items[-1].count
        copies = self.swapping.copies() if self.swapping is not None else ((), ())
        return ScheduledBatch(tuple(items), (*displaced, *preempted), *copies)

    def schedule_after(self, flight: ScheduledBatch) -> ScheduledBatch | None:
        """Decide the step after one whose tokens are not known yet: all of them decode on.

        That one is handed to ``postprocess`` before this one. A request that ends at the token it
        gets there is computed here for nothing, unless its length alone says so.

        Returns: None where that must be known first, or others have a turn.
        """
        flying = {item.state for item in flight.items}
        if self._others_may_run() or any(state not in flying for state in self.running):
            return None
        items = []
        for item in flight.items:
            state, length = item.state, item.stop + 1  # with the token that is on its way
            if state.slot is None or length >= state.stop_at:
                continue
            if not self.pages.grow(state.held, length):
                return None
            items.append(ScheduledItem(state, item.stop, 1))
        return ScheduledBatch(tuple(items)) if items else None

    def postprocess(
        self, batch: ScheduledBatch, chosen: Mapping[RequestState, Sequence[int]]
    ) -> list[tuple[RequestState, FinishReason]]:
        """Book what a step has computed.

        Args:
            batch: the step.
            chosen: new tokens per request that has any.

        Returns: requests that are finished; they have left the scheduler.
        """
        finished: list[tuple[RequestState, FinishReason]] = []
        for item in batch.items:
            state = item.state
            if state.slot is None:
                continue  # failed in this step
            new = chosen.get(state, ())
            state.token_ids += new
            state.computed = item.stop + item.accepted(new)
            self.pages.commit(state.held, state.token_ids, state.computed)
            if item.guesses:
                self.pages.shrink(state.held, len(state.token_ids))
            reason = self._finish_reason(state, sampled=state in chosen)
            if reason is not None:
                self.remove(state)
                finished.append((state, reason))
        return finished

    def _decodes(self, preempted: list[RequestState]) -> list[ScheduledItem]:
        """One token for each request that is decoding; makes room by preempting the latest.

        Several new tokens get their pages here too; only their computing is left to the budget.
        """
        items = []
        for state in list(self.running):
            if state.slot is None:
                continue
            # A prompt has its pages already, then this takes none.
            while not self.pages.grow(state.held, len(state.token_ids)):
                victim = self.running[-1]
                self._preempt(victim)
                preempted.append(victim)
                if victim is state:
                    break
            else:
                if state.pending == 1:
                    items.append(ScheduledItem(state, state.computed, 1))
        return items

    def _others_may_run(self) -> bool:
        """Whether a waiting request could be admitted, in whatever way."""
        if not self.waiting:
            return False
        first = self.waiting[0]
        if len(self.running) < self.max_running and self._refused != self._situation(first):
            return True
        return not self.running or first.request.priority < self.running[-1].request.priority

    def _make_way(self) -> list[RequestState]:
        """Preempt the latest request, if one of higher priority has no place or no pages."""
        if not self.waiting or not self.running:
            return []
        first, last = self.waiting[0], self.running[-1]
        full = len(self.running) == self.max_running or self._refused == self._situation(first)
        if not full or last.request.priority <= first.request.priority:
            return []
        self._preempt(last)
        return [last]

    def _situation(self, state: RequestState) -> tuple[RequestState, int, int]:
        """What must change before a request that was refused can be admitted."""
        return state, self.pages.allocator.releases, len(self.running)

    def _admit(self) -> RequestState | None:
        """Let the first waiting request run, if there is a place and pages for it."""
        if not self.waiting or len(self.running) == self.max_running:
            return None
        state = self.waiting[0]
        situation = self._situation(state)
        if self._refused == situation:
            return None  # no page was given back and nobody has left since it was last refused
        own = state.swapped is not None and not state.swapped.shared
        taken = self.pages.take(
            state.token_ids,
            reuse_limit=0 if own else state.reuse_limit,
            # Room to grow into for those that run, or they would soon preempt the newcomer.
            headroom=len(self.running),
            adapters=state.adapter_key,
            salt=state.request.cache_salt,
        )
        if taken is None:
            self._refused = situation
            return None
        del self.waiting[0]
        state.held, state.computed = taken
        state.slot = self._slots.pop()
        if state.cached_tokens is None:
            state.cached_tokens = state.computed
            self.prefix_hit_tokens += state.computed
        if state.swapped is not None:
            self.swapping.restore(state)
        bisect.insort(self.running, state, key=_sort_key)
        return state

    def _preempt(self, state: RequestState) -> None:
        self._leave(state)
        if self.swapping is not None:
            self.swapping.save(state)
        self.pages.give_back(state.held)
        state.computed = 0
        self.preemptions += 1
        bisect.insort(self.waiting, state, key=_sort_key)

    def _leave(self, state: RequestState) -> None:
        assert state.slot is not None, "only a running request holds a slot"
        self.running.remove(state)
        self._slots.append(state.slot)
        state.slot = None

    def _finish_reason(self, state: RequestState, *, sampled: bool) -> FinishReason | None:
        if sampled and state.token_ids[-1] in state.end_token_ids:
            return "stop"
        if sampled and state.complete:
            return "stop"
        complete = sampled or state.pending == 0
        return "length" if complete and not state.wants_token else None
