"""Along the guesses of a request: which tokens the sampler chooses, one after the other.

A draw is a function of (seed, position) and the logits, so the token that plain decoding would
choose at a guessed position is known as soon as its logits are. A walk takes that very token at
each position and goes on while it equals the guess: what comes out is what plain decoding gives,
greedy or drawn. (Leviathan et al. 2023, arXiv:2211.17192, accept and reject by chance instead,
because their draws are not tied to positions.)

Walks go on copies of the request's sampling state. The engine takes a copy over when it books the
step; a step that has to be computed again starts from what was booked.

Shapes: R rows of logits, one per request and one more per guess, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from oxillama_torch.engine.state import RequestState, ScheduledItem
from oxillama_torch.errors import OxiLlamaError, RequestError
from oxillama_torch.sampling.constraint_matcher import Matcher
from oxillama_torch.sampling.mask import Masks
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.sampler import Sampled

__all__ = ["Walk", "walk_along"]

Choose = Callable[[torch.Tensor, list[SamplingRow], Masks | None], list[Sampled]]
StartMasks = Callable[[Sequence[Matcher | None]], Masks | None]


class Walk:
    """One request's way along its guesses.

    Args:
        item: the request's share of the step.

    Attributes:
        row, matcher: copies of the request's, as they are behind the tokens chosen so far.
        tokens: what was chosen, what its grammar forces included.
        logprobs: of each of them, None for those that were not asked for.
        error: why not even the first token could be chosen.
        done: whether the way ends here.
    """

    __slots__ = ("done", "error", "item", "logprobs", "matcher", "row", "tokens")

    def __init__(self, item: ScheduledItem) -> None:
        state = item.state
        self.item = item
        self.row: SamplingRow = state.row.copy()
        self.matcher: Matcher | None = None if state.matcher is None else state.matcher.copy()
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.error: OxiLlamaError | None = None
        self.done = False

    @property
    def rows(self) -> int:
        """Rows of logits: of the last known token and of each guess."""
        return 1 + len(self.item.guesses)

    @property
    def first_rows(self) -> int:
        """Rows that are sampled at once: all, or one where the next depends on its token."""
        return 1 if self.matcher is not None or self.row.sees_tokens else self.rows

    def take(self, sampled: Sampled) -> None:
        """Go on by what was sampled behind the tokens chosen so far."""
        state: RequestState = self.item.state
        if sampled.error is not None:
            self._end(sampled.error)
            return
        try:
            new = state.follow(sampled.token_id, self.matcher, len(self.tokens))
        except RequestError as error:
            self._end(error)
            return
        for token_id in new:
            self.row.accept(token_id)
        self.tokens += new
        self.logprobs += [sampled.logprobs] * len(new)
        self.done = (
            new[-1] in state.end_token_ids
            or (self.matcher is not None and self.matcher.complete)
            or len(state.token_ids) + len(self.tokens) >= state.stop_at
            or len(self.tokens) > len(self.item.guesses)
            or tuple(self.tokens) != self.item.guesses[: len(self.tokens)]
        )

    def wrong(self) -> list[bool]:
        """For each row, whether its token is a guess that was not accepted."""
        right = 1 + self.item.accepted(self.tokens)
        return [index >= right for index in range(self.rows)]

    def book(self) -> list[int]:
        """Make the copies the request's own. Returns: the tokens."""
        state = self.item.state
        state.row, state.matcher = self.row, self.matcher
        return self.tokens

    def _end(self, error: OxiLlamaError) -> None:
        """Behind tokens that were chosen, the next step meets the same again and tells it."""
        self.done = True
        if not self.tokens:
            self.error = error
        elif self.matcher is not None:
            # It may have gone a token too far.
            self.matcher = self.item.state.matcher.copy()
            for token_id in self.tokens:
                self.matcher.accept(token_id)


def walk_along(
    walks: Sequence[Walk],
    logits: torch.Tensor,
    masks: Masks | None,
    *,
    choose: Choose,
    start_masks: StartMasks,
) -> None:
    """Let all walks go as far as they can.

    Args:
        walks: in the order of their rows.
        logits: float32 [R, V].
        masks: of the ``first_rows`` of all, in order.
        choose: samples rows of logits with their masks.
        start_masks: makes further masks, as ``MaskFiller.start``.
    """
    starts = list(itertools.accumulate([walk.rows for walk in walks], initial=0))
    ahead = [(walk, start, i) for walk, start in zip(walks, starts) for i in range(walk.first_rows)]
    rows = [walk.row.ahead(i) if i else walk.row for walk, _, i in ahead]
    sampled = choose(_lines(logits, [start + i for _, start, i in ahead]), rows, masks)
    for (walk, *_), found in zip(ahead, sampled):
        if not walk.done:
            walk.take(found)
    while going := [(walk, start) for walk, start in zip(walks, starts) if not walk.done]:
        lines = [start + len(walk.tokens) for walk, start in going]
        masks = start_masks([walk.matcher for walk, _ in going])
        found = choose(_lines(logits, lines), [walk.row for walk, _ in going], masks)
        for (walk, _), out in zip(going, found):
            walk.take(out)


def _lines(logits: torch.Tensor, lines: Sequence[int]) -> torch.Tensor:
    """float32 [len(lines), V]."""
    if len(lines) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(lines, device=logits.device))
