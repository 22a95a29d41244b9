"""One step of the engine: schedule, run, sample, book, tell.

Token ids only: no text, no tokenizer, no HTTP, no threads. ``thread.EngineThread`` drives it.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import numpy as np
import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.batch import BatchBuilder
from oxillama_torch.engine.graphs import GraphDevice
from oxillama_torch.engine.model_runner import ItemResult, Model, ModelRunner
from oxillama_torch.engine.outbox import Delivery
from oxillama_torch.engine.page_memory import allocate_pages
from oxillama_torch.engine.pooling import finish_pooling, pool_rows
from oxillama_torch.engine.prefill_graphs import prefill_graphs
from oxillama_torch.engine.recording import Recording
from oxillama_torch.engine.request import (
    ErrorEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    RequestHandle,
    TokenEvent,
)
from oxillama_torch.engine.run_ahead import LineFigures, line_runner
from oxillama_torch.engine.scheduler import Scheduler
from oxillama_torch.engine.speculation.choice import speculator
from oxillama_torch.engine.state import RequestState, ScheduledBatch, ScheduledItem
from oxillama_torch.engine.stats import Counters
from oxillama_torch.engine.steps import Steps
from oxillama_torch.engine.validate import check_request
from oxillama_torch.errors import OxiLlamaError, RequestError, UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.lora.registry import AdapterRegistry, LoadedAdapter
from oxillama_torch.models.decoder import Decoder
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler, Matcher
from oxillama_torch.sampling.custom import find_processors
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.words import Words, has_texts

__all__ = ["DEFAULT_BATCH_SIZE", "Engine", "on_device"]

DEFAULT_BATCH_SIZE = 64

log = logging.getLogger(__name__)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a GPU the current one: Triton launches there, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Engine:
    """A model, its KV pages and the requests it works on. One thread at a time may use it.

    Args:
        model: the decoder.
        config: sizes; see EngineConfig.
        eos_ids: the model's end-of-generation tokens.
        banned_ids: tokens that are never chosen.
        fingerprint: identifies everything that shapes an output, see ``loading.fingerprint``.
        adapters: those that requests may name; None: none ever.
        constraints: compiles those of requests; None: requests must not have any.
        words: makes tokens of the texts among sampling parameters; None: there must not be any.
        graphs: records decode steps as graphs, see ``run_ahead.LineRunner``; None: every step is
            launched kernel by kernel.
        draft: model that guesses, for ``speculation="draft"``; of the same vocabulary.
        clock: monotonic seconds.

    Attributes:
        model, adapters: as given.
        max_context: most tokens of one request.
        vocab_size: ids are below it.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        *,
        eos_ids: frozenset[int] = frozenset(),
        banned_ids: frozenset[int] = frozenset(),
        fingerprint: str = "",
        adapters: AdapterRegistry | None = None,
        constraints: ConstraintCompiler | None = None,
        words: Words | None = None,
        graphs: GraphDevice | None = None,
        draft: Decoder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._eos_ids, self._clock = eos_ids, clock
        self.model, self.fingerprint, self.adapters = model, fingerprint, adapters
        self.vocab_size = model.config.vocab_size
        self._constraints, self._words = constraints, words
        batch_size = config.max_batch_size or DEFAULT_BATCH_SIZE
        longest = model.config.context_length
        context = min(config.max_context or longest, longest)
        size = config.page_size
        lines = min(config.graph_batch_size or batch_size, batch_size, config.max_batch_tokens)
        memory = allocate_pages(
            model,
            config,
            draft=draft,
            useful_tokens=batch_size * -(-context // size) * size,
            graph_lines=lines if graphs is not None else 0,
            identity=fingerprint,
        )
        self._scheduler = Scheduler(
            memory.pages,
            max_batch_size=batch_size,
            max_batch_tokens=config.max_batch_tokens,
            max_context=context,
            swapping=memory.swapping,
        )
        self.max_context = self._scheduler.max_context
        builder = BatchBuilder(
            slots=self._scheduler.max_running,
            max_pages=memory.pages.pages_for(self.max_context),
            page_size=size,
            device=model.device,
            layers=adapters.targets.numbers if adapters is not None else {},
        )
        self._counters = Counters()
        self._lines = prefill = None
        if graphs is not None:
            self._lines = line_runner(model, memory.pool, builder, banned_ids, graphs, lines=lines)
            prefill = prefill_graphs(model, memory.pool, builder, graphs, config)
        self._graphs = Recording(self._lines, prefill)
        self._runner = ModelRunner(model, memory.pool, builder, banned_ids, memory.host, prefill)
        guessing = speculator(
            config, memory.pages, memory.format, self._counters,
            vocab_size=self.vocab_size, draft=draft,
        )  # fmt: skip
        self._steps = Steps(self._scheduler, self._runner, self._lines, self._counters, guessing)
        self._rules = registry.active_rules()
        self._order = itertools.count()
        self._handles: dict[str, tuple[RequestState, RequestHandle]] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._events: list[Delivery] = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._handles

    @property
    def has_work(self) -> bool:
        return len(self._scheduler) > 0

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def completed(self) -> int:
        """Requests that have ended, in whatever way."""
        return self._counters.finished + self._counters.cancelled + self._counters.failed

    def check(self, request: GenerationRequest) -> None:
        """Refuse what cannot be served. Any thread may call this.

        Raises:
            RequestError: names the field.
        """
        names = self.adapters.names() if self.adapters is not None and request.adapters else ()
        check_request(
            request, vocab_size=self.vocab_size, max_context=self.max_context, adapters=names
        )

    def resolve(self, request: GenerationRequest) -> tuple[tuple[LoadedAdapter, float], ...]:
        """The adapters of a checked request, as they are now. Any thread may call this."""
        return self.adapters.resolve(request.adapters) if request.adapters else ()

    def tokenized(self, request: GenerationRequest) -> GenerationRequest:
        """The request with tokens for the texts of its parameters. Any thread may call this."""
        if not has_texts(request.params):
            return request
        if self._words is None:
            raise UnsupportedError("bad words and breakers: this engine was given no vocabulary")
        return replace(request, params=self._words.resolve(request.params))

    def matcher(self, request: GenerationRequest) -> Matcher | None:
        """What watches over a request's output, if something does. Any thread may call this.

        Raises:
            RequestError: its constraint cannot be compiled.
        """
        params = request.params
        if params.constraint is None:
            return None
        if self._constraints is None:
            raise UnsupportedError("constraints: this engine was given no vocabulary")
        return self._constraints.matcher(params.constraint, goes_on=params.ignore_eos)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: the model's weights have changed."""
        self._scheduler.forget_prefixes()
        self._graphs.drop()

    def capture_graphs(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Record steps now; what is not recorded is when it is first wanted.

        Args:
            progress: called with (graphs made, graphs in all).
        """
        self._graphs.capture_all(progress)

    def add(self, handle: RequestHandle) -> None:
        """Take in a request that ``check`` has let pass."""
        request = handle.request
        params = request.params
        end_ids = frozenset(params.stop_token_ids)
        row = SamplingRow(
            params,
            request.prompt_token_ids,
            end_ids | self._eos_ids,
            find_processors(params.processors),
        )
        state = RequestState(
            request,
            row=row,
            end_token_ids=end_ids if params.ignore_eos else end_ids | self._eos_ids,
            max_context=self.max_context,
            order=next(self._order),
            adapters=handle.adapters,
            matcher=handle.matcher,
        )
        assert (handle.matcher is None) == (params.constraint is None), "nothing goes unwatched"
        self._handles[request.request_id] = (state, handle)
        self._scheduler.add(state)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> list[Delivery]:
        """Drop a request, wherever it stands; its pages are free at once.

        Unknown ids are ignored: the request may have ended a moment ago.
        """
        if request_id not in self._handles:
            return []
        state, handle = self._handles.pop(request_id)
        self._scheduler.remove(state)
        self._counters.cancelled += 1
        return [(handle, FinishEvent(reason, state.generated))]

    def request_ids(self) -> list[str]:
        """Every request at hand."""
        return list(self._handles)

    def drop_all(self) -> list[RequestHandle]:
        """Handles of every request that was not told its end, for an engine that does not go on."""
        handles = [handle for _, handle in self._handles.values()]
        handles += [
            handle for handle, event in self._events if isinstance(event, FinishEvent | ErrorEvent)
        ]
        self._handles.clear()
        self._events.clear()
        return handles

    def step(self) -> list[Delivery]:
        """Compute one step.

        Returns: events in the order in which they are to be delivered.

        Raises:
            torch.AcceleratorError: the device is beyond use.
        """
        started = self._clock()
        if registry.active_rules() is not self._rules:
            # Other kernels may round differently: what they are measured on must be their own.
            self._rules = registry.active_rules()
            self.forget_prefixes()
        self._events += self._expire(started)
        batch, results = self._steps.next()
        if batch.items:
            generated = self._advance(batch, results)
            self._count(batch, generated, self._clock() - started)
        events, self._events = self._events, []
        return events

    def _advance(self, batch: ScheduledBatch, results: Mapping[RequestState, ItemResult]) -> int:
        """Book a batch. Returns: tokens generated."""
        chosen: dict[RequestState, list[int]] = {}
        for item in batch.items:
            state, result = item.state, results[item.state]
            if result.error is None and result.walk is not None:
                chosen[state] = result.walk.book()
            elif result.error is None and result.token_id is not None:
                try:
                    chosen[state] = state.follow(result.token_id)
                except RequestError as error:
                    result.error = error
            if result.error is not None:
                self._fail(state, result.error)
            else:
                self._book(item, result, chosen.get(state, []))
        if self._steps.speculator is not None:
            self._steps.speculator.learn(batch, chosen)
        for state, reason in self._scheduler.postprocess(batch, chosen):
            _, handle = self._handles.pop(state.request.request_id)
            self._counters.finished += 1
            self._events.append((handle, FinishEvent(reason, state.generated)))
        return sum(map(len, chosen.values()))

    def stats(self) -> dict[str, int | float]:
        """Counters and gauges; any thread may ask, figures may be one step apart."""
        lines = LineFigures() if self._lines is None else self._lines.figures()
        return {
            **self._scheduler.stats(),
            "max_context": self.max_context,
            "sampled_by_op": self._runner.sampled_by["op"] + lines.sampled,
            "sampled_by_chain": self._runner.sampled_by["chain"] + lines.chained,
            "graphs": len(self._graphs),
            "graph_bytes": lines.bytes,
            "graph_steps": lines.steps,
            "graph_prompts": self._graphs.prompts,
            "steps_ahead": lines.steps_ahead,
            **asdict(self._counters),
        }

    def _expire(self, now: float) -> list[Delivery]:
        events: list[Delivery] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            # Another request may have come by the id since.
            state, _ = self._handles.get(request_id, (None, None))
            if state is not None and state.request.deadline == deadline:
                events += self.cancel(request_id, "deadline")
        return events

    def _fail(self, state: RequestState, error: OxiLlamaError) -> None:
        """End one request with an error; what it left in its pages must not reach another."""
        _, handle = self._handles.pop(state.request.request_id)
        self._runner.clear(self._scheduler.discard(state))
        self._counters.failed += 1
        self._events.append((handle, ErrorEvent(error)))

    def _book(self, item: ScheduledItem, result: ItemResult, tokens: list[int]) -> None:
        """Keep a request's new outputs and say what is to be said about them."""
        state = item.state
        handle = self._handles[state.request.request_id][1]
        if item.scored_positions:
            state.prompt_logprobs += result.prompt_logprobs
            self._keep_captured(state, result.captured)
            state.scored = item.scored_positions.stop
        if not state.prompt_sent and item.stop >= state.prompt_tokens:
            state.prompt_sent = True
            self._events.append((handle, _prompt_event(state)))
        if result.walk is not None:
            for token_id, logprobs in zip(tokens, result.walk.logprobs):
                self._events.append((handle, TokenEvent(token_id, logprobs)))
            return
        for token_id in tokens:
            state.row.accept(token_id)
            self._events.append((handle, TokenEvent(token_id, result.logprobs)))

    @staticmethod
    def _keep_captured(state: RequestState, captured: list[np.ndarray]) -> None:
        """All rows, or with pooling the one row they come to: long prompts would hold much."""
        pooling = state.request.pooling
        if pooling is None:
            state.captured += captured
            return
        for rows in captured:
            so_far = state.captured[0] if state.captured else None
            state.captured = [pool_rows(pooling, so_far, rows)]

    def _count(self, batch: ScheduledBatch, generated: int, seconds: float) -> None:
        counters = self._counters
        counters.steps += 1
        counters.step_seconds += seconds
        counters.last_step_seconds = seconds
        counters.generated_tokens += generated
        counters.prompt_tokens += sum(
            item.count - (item.start >= item.state.prompt_tokens) for item in batch.items
        )


def _prompt_event(state: RequestState) -> PromptEvent:
    """The PromptEvent; what it carries is not kept any longer."""
    logprobs = captured = None
    if state.request.params.prompt_logprobs is not None:
        logprobs = tuple(state.prompt_logprobs)
    if state.capture is not None:
        captured = np.concatenate(state.captured)
        if state.request.pooling is not None:
            captured = finish_pooling(state.request.pooling, captured, state.prompt_tokens)
    state.prompt_logprobs, state.captured = [], []
    assert state.cached_tokens is not None, "the request has been admitted"
    return PromptEvent(state.prompt_tokens, state.cached_tokens, logprobs, captured)
