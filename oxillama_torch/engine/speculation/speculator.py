"""Guesses for a step: who gets how many, in which pages, and what became of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from oxillama_torch.engine.speculation.pace import Guessing, Pace
from oxillama_torch.engine.speculation.proposer import Proposer, Wish
from oxillama_torch.engine.state import RequestState, ScheduledBatch, ScheduledItem
from oxillama_torch.engine.stats import Counters
from oxillama_torch.kvcache.holdings import PageManager

__all__ = ["Speculator", "without_guesses"]

log = logging.getLogger(__name__)


class Speculator:
    """Adds guesses to scheduled batches.

    Guesses come last: they get what decoding, prompts and admissions have left of the step's token
    budget, in equal shares, and pages that are to be had without taking any from a request.

    Args:
        proposer: makes the guesses.
        pages: the scheduler's.
        max_batch_tokens: token budget of one step.
        most: guesses per request and step, at most.
        counters: the engine's.
    """

    def __init__(
        self,
        proposer: Proposer,
        pages: PageManager,
        *,
        max_batch_tokens: int,
        most: int,
        counters: Counters,
    ) -> None:
        self._proposer, self._pages = proposer, pages
        self._max_batch_tokens, self._most = max_batch_tokens, most
        self._counters = counters

    def add_guesses(self, batch: ScheduledBatch) -> ScheduledBatch:
        """The batch with guesses for the requests that are decoding, as far as there are any."""
        decoding = [item for item in batch.items if _decodes(item)]
        if not decoding:
            return batch
        share = (self._max_batch_tokens - batch.tokens) // len(decoding)
        wishes = [
            Wish(item.state, most) for item in decoding if (most := self._room(item.state, share))
        ]
        guesses = self._propose(wishes)
        items = tuple(
            replace(item, guesses=ids) if (ids := guesses.get(item.state)) else item
            for item in batch.items
        )
        for wish in wishes:
            # What no guess came for is free again at once.
            tokens = len(wish.state.token_ids) + len(guesses[wish.state])
            self._pages.shrink(wish.state.held, tokens)
        self._counters.proposed_tokens += sum(map(len, guesses.values()))
        return replace(batch, items=items)

    def learn(self, batch: ScheduledBatch, chosen: Mapping[RequestState, Sequence[int]]) -> None:
        """Take in how a step has ended, before it is booked.

        Args:
            batch: the step as it was computed.
            chosen: new tokens per request that has any.
        """
        for item in batch.items:
            if item.guesses and item.state in chosen:
                tokens = chosen[item.state]
                # The last token may be a guess that was right, with nothing behind it.
                right = item.accepted([*tokens, -1])
                item.state.guessing.pace.learn(len(item.guesses), right)
                self._counters.accepted_tokens += right
                self._counters.speculated_items += 1

    def _room(self, state: RequestState, share: int) -> int:
        """How many guesses a request can take; it has the pages for them then."""
        if state.guessing is None:
            state.guessing = Guessing(Pace(self._most))
        known = len(state.token_ids)
        room = min(state.guessing.pace.turn(), share, state.stop_at - known - 1)
        if room <= 0:
            return 0
        if not self._pages.grow(state.held, known + room):
            room = min(room, len(state.held.pages) * self._pages.page_size - known)
        return room

    def _propose(self, wishes: Sequence[Wish]) -> dict[RequestState, tuple[int, ...]]:
        """Guesses by request. A proposer that fails costs its guesses, not the requests."""
        if not wishes:
            return {}
        try:
            found = self._proposer.propose(wishes)
        except torch.AcceleratorError:
            raise  # every later call on this device fails too
        except Exception:
            log.exception("no guesses: the proposer failed")
            self._counters.proposer_failures += 1
            found = [()] * len(wishes)
        return {wish.state: tuple(ids)[: wish.most] for wish, ids in zip(wishes, found)}


def without_guesses(batch: ScheduledBatch) -> ScheduledBatch:
    """The same step with known tokens alone."""
    return replace(batch, items=tuple(replace(item, guesses=()) for item in batch.items))


def _decodes(item: ScheduledItem) -> bool:
    """Whether a request has begun to generate and chooses a token in this step."""
    return item.samples and item.start >= item.state.prompt_tokens
