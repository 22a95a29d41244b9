"""Results of the Python front door, and the loop that turns engine events into them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from oxillama_torch.chat.prompt import Prompt
from oxillama_torch.chat.reply import Assembly, PlainReply, ReplyFormat
from oxillama_torch.chat.tool import ToolCall
from oxillama_torch.engine.outbox import Outbox
from oxillama_torch.engine.request import (
    ErrorEvent,
    Event,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    RequestHandle,
    TokenEvent,
)
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import CapacityError
from oxillama_torch.sampling.params import SamplingParams, TokenLogprobs
from oxillama_torch.sampling.philox import child_seed, random_seed
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Collector", "Completion", "Piece", "Score", "requests_for"]

_RETRY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One continuation of one prompt.

    Args:
        text: without special tokens and without the stop string that ended it; of a chat, the
            answer without reasoning and calls.
        token_ids: every generated token, an end-of-generation token included.
        finish_reason: ``stop`` or ``length``; ``cancelled`` when the engine was stopped.
        logprobs: one per token, if asked for.
        prompt_token_ids: the prompt.
        prompt_logprobs: one per prompt token, None for the first, if asked for.
        cached_tokens: prompt tokens that came from the prefix cache.
        seed: repeats this completion when given with ``n=1``.
        reasoning: what the model thought before its answer, where it is marked.
        tool_calls: the tools it wants to be called.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None
    cached_tokens: int
    seed: int
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to a stream.

    Args:
        text: may be empty: half a character, or the possible start of a stop string.
        token_id: None for what was held back until the end.
        finish_reason: set on the last piece.
    """

    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a text is.

    Args:
        token_ids: its tokens.
        logprobs: natural logarithms, None for the first token.
        total: their sum.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    total: float


def requests_for(
    ids: Sequence[int], params: SamplingParams, adapters: tuple[tuple[str, float], ...]
) -> list[GenerationRequest]:
    """``n`` requests for one prompt, each with a seed of its own."""
    seed = random_seed() if params.seed is None else params.seed
    return [
        GenerationRequest(
            prompt_token_ids=tuple(ids),
            params=replace(params, n=1, seed=child_seed(seed, index)),
            adapters=adapters,
        )
        for index in range(params.n)
    ]


class _Open:
    """A request on its way."""

    def __init__(
        self, handle: RequestHandle, tokenizer: Tokenizer, reply_format: ReplyFormat | None
    ) -> None:
        self.handle = handle
        make = PlainReply if reply_format is None else reply_format.reply
        self.reply = make(tokenizer, handle.request.params.stop)
        self.parts = Assembly()
        self.pieces: list[Piece] = []
        self.prompt: PromptEvent | None = None

    def take(self, event: Event) -> Piece | None:
        """Book an event. Returns: what it adds to the text.

        Raises:
            the error of a request that failed.
        """
        if isinstance(event, PromptEvent):
            self.prompt = event
            return None
        if isinstance(event, ErrorEvent):
            raise event.error
        if isinstance(event, TokenEvent):
            text = self.parts.add(self.reply.push(event.token_id))
            reason = None
            if self.reply.stopped:
                text, reason = text + self.parts.add(self.reply.flush()), "stop"
            piece = Piece(text, event.token_id, event.logprobs, reason)
        else:
            assert isinstance(event, FinishEvent), f"an unknown event: {event}"
            text = self.parts.add(self.reply.flush())
            piece = Piece(text, None, None, event.reason)
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """The whole, once the last piece is there."""
        request, tokens = self.handle.request, [p for p in self.pieces if p.token_id is not None]
        scored = self.prompt.logprobs if self.prompt is not None else None
        return Completion(
            text=self.parts.text,
            token_ids=[piece.token_id for piece in tokens],
            finish_reason=self.pieces[-1].finish_reason,
            logprobs=None if request.params.logprobs is None else [p.logprobs for p in tokens],
            prompt_token_ids=list(request.prompt_token_ids),
            prompt_logprobs=None if scored is None else list(scored),
            cached_tokens=self.prompt.cached_tokens if self.prompt is not None else 0,
            seed=request.params.seed,
            reasoning=self.parts.reasoning,
            tool_calls=self.parts.calls,
        )


class Collector:
    """Runs requests through the engine and collects what comes, in the calling thread.

    Args:
        engine: the batching thread.
        tokenizer: turns ids into text.
    """

    def __init__(self, engine: EngineThread, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._outbox = Outbox()
        self._numbers: dict[str, int] = {}
        self._open: dict[int, _Open] = {}
        self._formats: dict[int, ReplyFormat] = {}

    def completions(
        self, requests: Sequence[GenerationRequest], formats: Sequence[ReplyFormat] = ()
    ) -> list[Completion]:
        """All requests to their end. The first failure cancels the rest and is raised.

        Args:
            formats: how each reply is written, where it is more than text.
        """
        self._formats = dict(enumerate(formats))
        return [done.completion() for done in self._run(requests)]

    def turns(
        self, turns: Sequence[Prompt], adapters: tuple[tuple[str, float], ...]
    ) -> list[Completion]:
        """Conversations, each with ``n`` completions, one after the other."""
        requests = [(r, t) for t in turns for r in requests_for(t.ids, t.params, adapters)]
        return self.completions([r for r, _ in requests], [t.reply_format for _, t in requests])

    def prompts(self, requests: Sequence[GenerationRequest]) -> list[PromptEvent]:
        """What the engine had to say about the prompts of requests that generate nothing."""
        return [done.prompt for done in self._run(requests)]

    def pieces(self, request: GenerationRequest) -> Iterator[Piece]:
        """One request, piece by piece. Closing the iterator cancels it."""
        self._submit(0, request)
        try:
            while self._open:
                piece = self._open[0].take(self._next()[1])
                if piece is not None:
                    if piece.finish_reason is not None:
                        self._end(0)
                    yield piece
        finally:
            self._cancel()

    def _run(self, requests: Sequence[GenerationRequest]) -> list[_Open]:
        waiting = deque(enumerate(requests))
        done: dict[int, _Open] = {}
        try:
            while waiting or self._open:
                self._submit_some(waiting)
                left = False
                while self._open and not (waiting and left):
                    index, event = self._next()
                    # A request that has begun or ended makes room in the inbox.
                    left = not isinstance(event, TokenEvent)
                    if index not in self._open:
                        continue
                    piece = self._open[index].take(event)
                    if piece is not None and piece.finish_reason is not None:
                        done[index] = self._end(index)
        finally:
            self._cancel()
        return [done[index] for index in range(len(requests))]

    def _submit_some(self, waiting: deque[tuple[int, GenerationRequest]]) -> None:
        """Submit until nothing waits or the inbox is full; other callers may fill it too."""
        while waiting:
            try:
                self._submit(*waiting[0])
                waiting.popleft()
            except CapacityError:
                if self._open:
                    return
                time.sleep(_RETRY_S)

    def _next(self) -> tuple[int, Event]:
        handle, event = self._outbox.get()
        return self._numbers[handle.request_id], event

    def _submit(self, index: int, request: GenerationRequest) -> None:
        handle = self._engine.submit(request, self._outbox)
        self._numbers[request.request_id] = index
        self._open[index] = _Open(handle, self._tokenizer, self._formats.get(index))

    def _end(self, index: int) -> _Open:
        """Take a finished request out; the engine drops one that a stop string has ended."""
        ended = self._open.pop(index)
        if ended.reply.stopped:
            ended.handle.cancel()
        return ended

    def _cancel(self) -> None:
        for left in self._open.values():
            left.handle.cancel()
        self._open.clear()
