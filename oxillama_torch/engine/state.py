"""One request while the engine works on it. Plain data, owned by the batching thread."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from oxillama_torch.engine.request import Capture, GenerationRequest
from oxillama_torch.engine.speculation.pace import Guessing
from oxillama_torch.kvcache.holdings import HeldPages
from oxillama_torch.kvcache.swap import PageCopy, SwappedPages
from oxillama_torch.lora.registry import LoadedAdapter
from oxillama_torch.sampling.constraint_matcher import Matcher
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.sampling.row import SamplingRow

__all__ = ["RequestState", "ScheduledBatch", "ScheduledItem"]


class RequestState:
    """Progress of one request.

    Args:
        request: what was asked for.
        row: its row at the sampler.
        end_token_ids: tokens that end it.
        max_context: most tokens, prompt and output together.
        order: position among requests of equal priority and arrival.
        adapters: those it uses to its end, each with its scale.
        matcher: where its output stands in the grammar it must follow; None: no grammar.

    Attributes:
        token_ids: prompt and generated tokens.
        computed: leading tokens whose keys and values lie in ``held`` pages.
        swapped: what it has in host memory while it is preempted, if anything.
        slot: line in the batch builder's page table while running, else None.
        scored: prompt positions whose outputs have been collected already.
        score_end: prompt positions below this one have outputs that were asked for.
        cached_tokens: prompt tokens found in the prefix cache at first admission.
        prompt_sent: whether the PromptEvent has gone out.
        guessing: what speculation keeps about the request; None: nothing yet.
    """

    __slots__ = (
        "adapters",
        "cached_tokens",
        "captured",
        "computed",
        "end_token_ids",
        "guessing",
        "held",
        "matcher",
        "prompt_logprobs",
        "prompt_sent",
        "prompt_tokens",
        "request",
        "row",
        "score_end",
        "scored",
        "slot",
        "sort_key",
        "stop_at",
        "swapped",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerationRequest,
        *,
        row: SamplingRow,
        end_token_ids: frozenset[int],
        max_context: int,
        order: int,
        adapters: tuple[tuple[LoadedAdapter, float], ...] = (),
        matcher: Matcher | None = None,
    ) -> None:
        params = request.params
        self.adapters, self.matcher = adapters, matcher
        self.request, self.row, self.end_token_ids = request, row, end_token_ids
        self.token_ids = list(request.prompt_token_ids)
        self.prompt_tokens = len(self.token_ids)
        limit = max_context if params.max_tokens is None else params.max_tokens + self.prompt_tokens
        self.stop_at = min(limit, max_context)
        self.sort_key = (request.priority, request.arrival, order)
        self.held = HeldPages()
        self.computed = 0
        self.swapped: SwappedPages | None = None
        self.slot: int | None = None
        # Of an embedding's last token alone, the rest of the prompt may come from the prefix cache.
        self.scored = self.prompt_tokens - 1 if request.pooling == "last" else 0
        self.score_end = 0
        if request.pooling == "first":
            self.score_end = 1
        elif request.capture is not None:
            self.score_end = self.prompt_tokens
        elif params.prompt_logprobs is not None:
            self.score_end = self.prompt_tokens - 1  # nothing follows the last token
        self.cached_tokens: int | None = None
        self.prompt_sent = False
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.captured: list = []
        self.guessing: Guessing | None = None

    @property
    def adapter_key(self) -> tuple[tuple[str, float], ...]:
        """Content and scale of each adapter: what keys and values depend on beside the tokens."""
        return tuple((loaded.digest, scale) for loaded, scale in self.adapters)

    @property
    def capture(self) -> Capture | None:
        return self.request.capture

    @property
    def generated(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.token_ids) - self.computed

    @property
    def wants_token(self) -> bool:
        """Whether a token is to be chosen once everything known is computed."""
        return len(self.token_ids) < self.stop_at

    def follow(
        self, token_id: int, matcher: Matcher | None = None, chosen_before: int = 0
    ) -> list[int]:
        """Tell the grammar the token that was chosen.

        Args:
            matcher: a copy to tell it instead of ``self.matcher``.
            chosen_before: tokens that come before it and are not in ``token_ids`` yet.

        Returns: it and, where the grammar leaves no choice, those that come after it: they are
            computed in one go and never sampled.

        Raises:
            RequestError: the grammar cannot be followed any further.
        """
        tokens = [token_id]
        matcher = self.matcher if matcher is None else matcher
        if matcher is None:
            return tokens
        matcher.accept(token_id)
        samples_all = self.request.params.logprobs is not None or self.row.chooses_alone
        if not samples_all and token_id not in self.end_token_ids:
            room = self.stop_at - len(self.token_ids) - chosen_before - 1
            for forced in matcher.forced()[: max(room, 0)]:
                if forced in self.end_token_ids or forced in self.request.params.logit_bias:
                    break  # whether it may come is for the sampler to say
                matcher.accept(forced)
                tokens.append(forced)
        if (error := matcher.error) is not None:
            raise error
        return tokens

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.complete

    @property
    def reuse_limit(self) -> int:
        """Tokens from here on must be computed: one at least, and all whose outputs are wanted."""
        limit = len(self.token_ids) - 1
        return min(limit, self.scored) if self.scored < self.score_end else limit


@dataclass(frozen=True, slots=True)
class ScheduledItem:
    """One request's share of a step: tokens ``start .. start + count - 1`` are computed.

    ``guesses`` are computed behind them: what may come next, if the sampler chooses the same.
    """

    state: RequestState
    start: int
    count: int
    guesses: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def width(self) -> int:
        """Tokens that are computed, guesses included."""
        return self.count + len(self.guesses)

    def accepted(self, chosen: Sequence[int]) -> int:
        """How many guesses are among the tokens that were chosen, and need no more computing."""
        # The last one chosen counts as known, not as computed, guessed or not.
        pairs = zip(self.guesses, chosen[:-1])
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    @property
    def samples(self) -> bool:
        """Whether this step chooses the request's next token."""
        return self.stop == len(self.state.token_ids) and self.state.wants_token

    @property
    def scored_positions(self) -> range:
        """Prompt positions whose outputs this step collects."""
        state = self.state
        if state.scored >= state.score_end:
            return range(0)
        return range(max(self.start, state.scored), min(self.stop, state.score_end))


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step's work.

    Args:
        items: what is computed.
        preempted: requests that have lost their pages.
        swap_out, swap_in: pages to copy before anything is computed, in this order.
    """

    items: tuple[ScheduledItem, ...] = ()
    preempted: tuple[RequestState, ...] = field(default=())
    swap_out: tuple[PageCopy, ...] = ()
    swap_in: tuple[PageCopy, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(item.width for item in self.items)
