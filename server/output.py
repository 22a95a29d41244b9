"""From engine events to text: everything a route needs to answer, streaming or not.

One ``Generation`` serves one HTTP request: it submits one engine request per choice, merges their
events, turns ids into text, applies stop strings and cancels what is left when the caller goes.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from oxillama_torch.chat.parts import CallStarted, Part, Text, Thought
from oxillama_torch.chat.reply import PlainReply, Reply, ReplyFormat
from oxillama_torch.engine.outbox import Delivery, Listener, Outbox
from oxillama_torch.engine.request import (
    ErrorEvent,
    Event,
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    RequestHandle,
    TokenEvent,
    TokenLogprobs,
)
from oxillama_torch.errors import EngineError, RequestError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.philox import child_seed, random_seed
from oxillama_torch.server.metering import current_meter
from oxillama_torch.server.priority import current_priority
from oxillama_torch.server.service import Service

__all__ = [
    "Choice",
    "ClientGone",
    "Finished",
    "Generation",
    "Output",
    "Piece",
    "Reasoning",
    "Started",
    "ToolCallArguments",
    "ToolCallStarted",
]


class ClientGone(Exception):  # noqa: N818 (no error of ours: nobody is left to be told)
    """The client has left; whatever is returned goes nowhere."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt of a choice has been read."""

    index: int
    prompt_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs | None, ...] | None


# Not frozen, which would quadruple its cost: one is made per token.
@dataclass(slots=True)
class Piece:
    """One token, or several joined, and the text that became certain with it (may be empty)."""

    index: int
    text: str
    token_id: int | None
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks before it answers."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """The model calls a tool: its ``call``-th of this choice, counted from 0."""

    index: int
    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A further fragment of a call's arguments; all of them together are one JSON text."""

    index: int
    call: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice: ``stop``, ``length`` or, where calls were made, ``tool_calls``."""

    index: int
    reason: str
    completion_tokens: int
    reasoning_tokens: int = 0


Output = Started | Piece | Reasoning | ToolCallStarted | ToolCallArguments | Finished


@dataclass(slots=True)
class Choice:
    """One continuation in the making."""

    handle: RequestHandle
    reply: Reply | PlainReply
    completion_tokens: int = 0
    finished: bool = False
    last_token_at: float | None = None


class Generation:
    """The engine requests of one HTTP request.

    Args:
        service: engine and tokenizer.
        prompts: token ids; ``params.n`` choices each, choice index = prompt * n + k.
        params: sampling parameters; each choice draws with a seed of its own made of ``seed``.
        deadline: ``time.monotonic()`` after which choices end, or None.
        adapters: (name, scale) pairs that every choice is generated with.
        reply_format: how replies are written; None: they are plain text.
    """

    __slots__ = (
        "_adapters", "_end_with", "_joinable", "_n", "_numbers", "_outbox", "_reply_format",
        "_service", "_unfinished", "choices", "meter",
    )  # fmt: skip

    def __init__(
        self,
        service: Service,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        deadline: float | None = None,
        adapters: tuple[tuple[str, float], ...] = (),
        reply_format: ReplyFormat | None = None,
    ) -> None:
        service.check_processors(params)
        self._service = service
        self._reply_format = reply_format
        self._adapters = adapters
        self._n = params.n
        self.meter = current_meter()
        self.meter.model = service.model_id
        self._outbox = Outbox()
        self._numbers: dict[str, int] = {}
        self._unfinished = 0
        self._end_with: Exception | None = None
        self.choices: list[Choice] = []
        #: The only choice, where its tokens may be joined.
        self._joinable: Choice | None = None
        seed = random_seed() if params.seed is None else params.seed
        try:
            for prompt in prompts:
                for k in range(params.n):
                    # Streams of different choices must not repeat each other.
                    nth = replace(params, n=1, seed=child_seed(seed, k))
                    self._submit(tuple(prompt), nth, deadline)
        except BaseException:
            self.cancel()
            raise
        if len(self.choices) == 1 and self.choices[0].reply.joins:
            self._joinable = self.choices[0]

    def _submit(
        self, prompt: tuple[int, ...], params: SamplingParams, deadline: float | None
    ) -> None:
        index = len(self.choices)
        request = GenerationRequest(
            prompt_token_ids=prompt,
            params=params,
            deadline=deadline,
            adapters=self._adapters,
            priority=current_priority(),
        )
        self._numbers[request.request_id] = index
        handle = self._service.engine.submit(request, self._outbox)
        tokenizer, wanted = self._service.tokenizer, self._reply_format
        reply = (wanted.reply if wanted is not None else PlainReply)(tokenizer, params.stop)
        self.choices.append(Choice(handle, reply))
        self._unfinished += 1

    def cancel(self) -> None:
        """Drop every choice that is not finished; idempotent, callable from any thread."""
        for choice in self.choices:
            if not choice.finished:
                choice.handle.cancel()

    def abort(self, error: Exception) -> None:
        """As cancel, and the reading thread gets ``error``."""
        self._end_with = error
        self.cancel()

    def client_gone(self) -> None:
        """The client has left: whoever reads outputs gets ClientGone."""
        self.abort(ClientGone())

    def notify(self, listener: Listener, name: object) -> None:
        """Have ``listener`` told when ``poll`` has something, see ``Outbox.notify``."""
        self._outbox.notify(listener, name)

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return self._unfinished == 0

    def poll(self, timeout_s: float | None = 0.0, *, join: bool = False) -> Iterator[Output]:
        """Outputs of the events that have come, waiting ``timeout_s`` (None: for ever) for one.

        Args:
            join: tokens that have come together may be one Piece, which names no token then.

        Raises:
            the error of a choice that failed; ClientGone. The caller cancels what is left.
        """
        deliveries = self._outbox.take()
        if not deliveries and timeout_s != 0:
            deliveries = self._awaited(timeout_s)
        now = time.perf_counter()
        if join and self._joinable is not None:
            yield from self._joined(self._joinable, deliveries, now)
            return
        several = len(self.choices) > 1
        for handle, event in deliveries:
            index = self._numbers[handle.request_id] if several else 0
            choice = self.choices[index]
            if choice.finished:
                continue
            if isinstance(event, TokenEvent):
                choice.completion_tokens += 1
                self.meter.tokens(1, choice.last_token_at, now)
                choice.last_token_at = now
                parts = choice.reply.push(event.token_id)
                if len(parts) == 1 and isinstance(parts[0], Text):
                    yield Piece(index, parts[0].text, event.token_id, event.logprobs)
                else:
                    yield from _outputs(index, parts, event)
                if choice.reply.stopped:
                    yield from _outputs(index, choice.reply.flush())
                    choice.handle.cancel()
                    yield self._finish(index, "stop")
            else:
                yield from self._convert(index, event)

    def _joined(self, choice: Choice, deliveries: list[Delivery], now: float) -> Iterator[Output]:
        """As ``poll``, for one choice: between two events of other kinds all tokens are a Piece."""
        token_ids = []
        for _, event in deliveries:
            if isinstance(event, TokenEvent):
                token_ids.append(event.token_id)
                continue
            if token_ids:
                yield self._piece(choice, token_ids, now)
                token_ids = []
            if not choice.finished:
                yield from self._convert(0, event)
        if token_ids:
            yield self._piece(choice, token_ids, now)

    def _piece(self, choice: Choice, token_ids: list[int], now: float) -> Piece:
        choice.completion_tokens += len(token_ids)
        self.meter.tokens(len(token_ids), choice.last_token_at, now)
        choice.last_token_at = now
        return Piece(0, choice.reply.push_all(token_ids), None, None)

    def _awaited(self, timeout_s: float | None) -> list[Delivery]:
        try:
            return [self._outbox.get(timeout_s), *self._outbox.take()]
        except queue.Empty:
            return []

    def outputs(self) -> Iterator[Output]:
        """All outputs of all choices as they come; raises as ``poll``."""
        while not self.finished:
            yield from self.poll(None)

    def _convert(self, index: int, event: Event) -> Iterator[Output]:
        """What an event that is no token comes to."""
        if isinstance(event, PromptEvent):
            if index % self._n == 0:
                self.meter.prompt(event.prompt_tokens, event.cached_tokens)
            yield Started(index, event.prompt_tokens, event.cached_tokens, event.logprobs)
        elif isinstance(event, FinishEvent):
            yield from self._end(index, event)
        elif isinstance(event, ErrorEvent):
            self._close(index)
            raise event.error

    def _end(self, index: int, event: FinishEvent) -> Iterator[Output]:
        if event.reason == "cancelled":
            raise self._end_with or EngineError("the request was cancelled")
        if event.reason == "deadline":
            raise RequestError("the request took too long", status=408, code="timeout", param=None)
        yield from _outputs(index, self.choices[index].reply.flush())
        yield self._finish(index, event.reason)

    def _finish(self, index: int, reason: str) -> Finished:
        choice = self._close(index)
        if reason == "stop" and choice.reply.calls:
            reason = "tool_calls"
        return Finished(index, reason, choice.completion_tokens, choice.reply.reasoning_tokens)

    def _close(self, index: int) -> Choice:
        choice = self.choices[index]
        choice.finished = True
        self._unfinished -= 1
        return choice


def _outputs(index: int, parts: Sequence[Part], token: TokenEvent | None = None) -> list[Output]:
    """What a token, or the end, adds to a choice: a token is part of exactly one Piece."""
    outputs: list[Output] = []
    if token is not None and not (parts and isinstance(parts[0], Text)):
        outputs.append(Piece(index, "", token.token_id, token.logprobs))
        token = None
    for part in parts:
        if isinstance(part, Text):
            token_id, logprobs = (token.token_id, token.logprobs) if token else (None, None)
            outputs.append(Piece(index, part.text, token_id, logprobs))
            token = None
        elif isinstance(part, Thought):
            outputs.append(Reasoning(index, part.text))
        elif isinstance(part, CallStarted):
            outputs.append(ToolCallStarted(index, part.call, part.id, part.name))
        else:
            outputs.append(ToolCallArguments(index, part.call, part.text))
    return outputs
