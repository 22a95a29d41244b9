"""Beam search for one HTTP request, with the face of a Generation that is not streamed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from oxillama_torch.engine.request import (
    FinishEvent,
    GenerationRequest,
    PromptEvent,
    RequestHandle,
    TokenEvent,
    TokenLogprobs,
)
from oxillama_torch.errors import EngineError, RequestError
from oxillama_torch.search import Beam, BeamSearch
from oxillama_torch.server.metering import current_meter
from oxillama_torch.server.output import ClientGone, Finished, Output, Piece, Started
from oxillama_torch.server.priority import current_priority
from oxillama_torch.server.service import Service

__all__ = ["BeamGeneration"]


class BeamGeneration:
    """The searches of one HTTP request; choice index = search * n + rank of the beam.

    Args:
        service: engine and tokenizer.
        searches: one per prompt.
        n: beams of each that are answered.
        top: alternatives to report with each token.
        deadline: ``time.monotonic()`` after which it ends, or None.
    """

    def __init__(
        self,
        service: Service,
        searches: Sequence[BeamSearch],
        n: int,
        top: int,
        deadline: float | None = None,
    ) -> None:
        self._service, self._searches, self._n, self._top = service, searches, n, top
        self._deadline = deadline
        self._handles: list[RequestHandle] = []
        self._end_with: Exception | None = None
        self._prompts: dict[int, PromptEvent] = {}
        self.meter = current_meter()
        self.meter.model = service.model_id

    def cancel(self) -> None:
        """Drop what is running; idempotent, callable from any thread."""
        for handle in self._handles:
            handle.cancel()

    def abort(self, error: Exception) -> None:
        """As cancel, and the reading thread gets ``error``."""
        self._end_with = error
        self.cancel()

    def client_gone(self) -> None:
        """The client has left: whoever reads outputs gets ClientGone."""
        self.abort(ClientGone())

    def outputs(self) -> Iterator[Output]:
        """Search to the end, then every beam as one piece per token.

        Raises:
            the error of a request that failed; ClientGone.
        """
        for number, search in enumerate(self._searches):
            while not search.done:
                search.advance(self._ask(number, search.requests()))
        for number, search in enumerate(self._searches):
            for rank, beam in enumerate(search.best()[: self._n]):
                yield from self._told(number, number * self._n + rank, beam)

    def _ask(self, number: int, requests: Sequence[GenerationRequest]) -> list[TokenLogprobs]:
        """One token of each request."""
        self._handles = []
        for request in requests:
            if self._end_with is not None:
                raise self._end_with
            self._handles.append(self._service.engine.submit(self._ready(request)))
        found = []
        for handle in self._handles:
            for event in handle.events():
                if isinstance(event, PromptEvent) and number not in self._prompts:
                    self._prompts[number] = event
                    self.meter.prompt(event.prompt_tokens, event.cached_tokens)
                elif isinstance(event, TokenEvent):
                    self.meter.tokens(1, None, time.perf_counter())
                    found.append(event.logprobs)
                elif isinstance(event, FinishEvent) and event.reason == "cancelled":
                    raise self._end_with or EngineError("the request was cancelled")
                elif isinstance(event, FinishEvent) and event.reason == "deadline":
                    raise RequestError(
                        "the request took too long", status=408, code="timeout", param=None
                    )
        return found

    def _ready(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, deadline=self._deadline, priority=current_priority())

    def _told(self, number: int, index: int, beam: Beam) -> Iterator[Output]:
        prompt = self._prompts[number]
        yield Started(index, prompt.prompt_tokens, prompt.cached_tokens, None)
        tokenizer = self._service.tokenizer
        text = tokenizer.decode(beam.token_ids, skip_special=True)
        for place, (token_id, entry) in enumerate(zip(beam.token_ids, beam.logprobs)):
            shown = TokenLogprobs(token_id, entry.logprob, entry.rank, entry.top[: self._top])
            yield Piece(index, text if place == 0 else "", token_id, shown)
        yield Finished(index, beam.finish_reason, len(beam.token_ids))
