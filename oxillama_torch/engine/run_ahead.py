"""Decoding on lines: steps are launched from graphs, and the next one before the last one is read.

A step that is launched and not yet read is a *flight*. The scheduler may decide the step after it
knowing only how long its requests will be; which tokens they get, the device knows by itself. What
ends at the flight's token has then been computed once too often: one wasted row, which the device
keeps from writing where it saw the end token. Where it could not see it (a client has gone), the
row writes its key and value into a page that may belong to another request by then. That harms
nobody: everything that touches pages is launched in order on one stream, and the other request
writes each of its places after that row, and before it reads it. The prefix cache takes pages only
once the tokens in them have been read.

B lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch

from oxillama_torch.engine.adapter_lines import AdapterLines, Adapters
from oxillama_torch.engine.batch import BatchBuilder
from oxillama_torch.engine.decode_graphs import DecodeGraphs
from oxillama_torch.engine.decode_state import DecodeState
from oxillama_torch.engine.decode_step import DecodeStep
from oxillama_torch.engine.device_sampling import RowSettings, is_served
from oxillama_torch.engine.graphs import GraphDevice, StepShape
from oxillama_torch.engine.model_runner import ItemResult, Model
from oxillama_torch.engine.state import RequestState, ScheduledBatch, ScheduledItem
from oxillama_torch.errors import OxiLlamaError
from oxillama_torch.kernels import registry
from oxillama_torch.kvcache.pool import KVPool
from oxillama_torch.sampling.mask import MaskFiller, Masks
from oxillama_torch.sampling.sampler import Sampled, pack, reported_logits, sample, unpack

__all__ = ["Flight", "LineFigures", "LineRunner", "line_runner"]


@dataclass(slots=True)
class Flight:
    """A step whose tokens are not known yet.

    Args:
        items: its requests.
        lines: where each of them stands.
        read: waits for what was chosen.
        chained: the tokens were chosen by the chain, and the lines do not know them.
    """

    items: list[ScheduledItem]
    lines: list[int]
    read: Callable[[], list[Sampled]]
    chained: bool = False

    @property
    def batch(self) -> ScheduledBatch:
        return ScheduledBatch(tuple(self.items))


@dataclass(frozen=True, slots=True)
class LineFigures:
    """What happened on lines.

    Args:
        bytes: what the lines and all graphs of the engine take on the device.
        steps: launched from graphs;  steps_ahead: those launched before the one before was read.
        sampled, chained: tokens chosen in steps, and by the chain of their logits.
    """

    bytes: int = 0
    steps: int = 0
    steps_ahead: int = 0
    sampled: int = 0
    chained: int = 0


class LineRunner:
    """Computes steps in which every request decodes one token.

    Args:
        state: the lines.
        graphs: the steps on them.
        device: copies tokens to the host.
        builder: knows the pages of running requests.
        masks: what grammars allow.
        adapters: those of the lines.
        banned: int64 ids that no request may choose; None: none.
    """

    def __init__(
        self,
        state: DecodeState,
        graphs: DecodeGraphs,
        device: GraphDevice,
        builder: BatchBuilder,
        masks: MaskFiller,
        adapters: AdapterLines,
        banned: torch.Tensor | None = None,
    ) -> None:
        self._state, self.graphs, self._device = state, graphs, device
        self._builder, self._masks, self._banned = builder, masks, banned
        self._adapters = adapters
        self._holders: list[RequestState | None] = [None] * state.lines
        # Where the device stands: the next position of each line, -1 for one that is not active.
        self._positions = [-1] * state.lines
        self._steps = self._steps_ahead = self._sampled = self._chained = 0

    def serves(self, batch: ScheduledBatch) -> bool:
        """Whether a step can be computed on lines."""
        if not 0 < len(batch.items) <= self._state.lines or registry.is_observed():
            return False
        return all(map(self._serves_item, batch.items))

    def _serves_item(self, item: ScheduledItem) -> bool:
        one = item.width == 1 and item.samples and not item.scored_positions
        return one and (not item.state.adapters or self._adapters.serves(item.state.adapters))

    def _chooses(self, item: ScheduledItem) -> bool:
        """Whether the step itself can choose a request's token; else its logits go to the chain."""
        state = item.state
        params, history = state.request.params, state.row.history
        reports_masked = params.logprobs is not None and params.logprobs_mode == "masked"
        return (
            is_served(state.row)
            and not (reports_masked and state.matcher is not None)
            and (history is None or len(history.ids) + 2 < self._state.token_ids.shape[1])
        )

    def runs_ahead(self, flight: Flight) -> bool:
        """Whether the next step of the same requests needs nothing that the host must know."""
        if flight.chained or registry.is_observed():
            return False
        return all(_feeds_itself(item.state, self._state) for item in flight.items)

    def launch(self, batch: ScheduledBatch) -> Flight:
        """Launch a step while none is in flight."""
        chooses = all(map(self._chooses, batch.items))
        items, lines = self._place(batch.items, chooses)
        self._sync_pages(items, lines)
        masks = self._masks.start([item.state.matcher for item in items])
        shape = self._shape(items, len(items))
        if masks is None and chooses:
            self.graphs.replay(shape)
            return self._flight(items, lines)
        try:
            self.graphs.replay(shape._replace(part="forward", penalised=False))
        finally:
            if masks is not None:
                masks.wait()
        if not chooses:
            return self._by_chain(items, lines, masks)
        places, words, failed = masks.words()
        self._state.write_bitmask(shape.lines, [lines[place] for place in places], words)
        self.graphs.replay(shape._replace(part="choose", reach=0, masked=True, adapters=None))
        return self._flight(items, lines, failed)

    def launch_after(self, flight: Flight, batch: ScheduledBatch) -> Flight | None:
        """Launch the step after one in flight, of some of its requests.

        Returns: None where fewer lines would do, to which they must be moved first.
        """
        line_of = dict(zip((item.state for item in flight.items), flight.lines))
        items = list(batch.items)
        lines = [line_of[item.state] for item in items]
        used = self.graphs.lines_for(max(flight.lines) + 1)
        if self.graphs.lines_for(len(items)) < used:
            return None
        self._vacate(set(flight.lines).difference(lines))
        self._sync_pages(items, lines)
        self.graphs.replay(self._shape(items, max(lines) + 1))
        self._steps_ahead += 1
        return self._flight(items, lines)

    def collect(self, flight: Flight) -> dict[RequestState, ItemResult]:
        """Wait for the tokens of a step."""
        return {
            item.state: ItemResult(out.token_id, out.logprobs, error=out.error)
            for item, out in zip(flight.items, flight.read())
        }

    def figures(self) -> LineFigures:
        """Counted since the start."""
        taken = self._state.nbytes + self._adapters.nbytes + self._device.memory()
        counted = (self._steps, self._steps_ahead, self._sampled, self._chained)
        return LineFigures(taken, *counted)

    def reset(self) -> None:
        """Forget who stands where, after a step that failed half-way."""
        self._holders = [None] * self._state.lines
        self._positions = [-1] * self._state.lines
        self._state.deactivate(range(self._state.lines))

    def _by_chain(
        self, items: list[ScheduledItem], lines: list[int], masks: Masks | None
    ) -> Flight:
        """Choose tokens on the host: some request wants a step that the device does not take."""
        self._steps += 1
        self._chained += len(items)
        for item, line in zip(items, lines):
            self._positions[line] = item.start  # not where the request goes on
        rows = [item.state.row for item in items]
        sampled = sample(self._state.logits[: len(items)], rows, self._banned, masks)
        return Flight(items, lines, lambda: sampled, chained=True)

    def _flight(
        self,
        items: list[ScheduledItem],
        lines: list[int],
        failed: Mapping[int, OxiLlamaError] = MappingProxyType({}),
    ) -> Flight:
        """Begin to read what was launched."""
        self._steps += 1
        self._sampled += len(items)
        for item, line in zip(items, lines):
            self._positions[line] = item.start + 1
        rows = [item.state.row for item in items]
        found, logits = self._state.outcomes[: len(lines)], self._state.logits[: len(lines)]
        if lines[-1] >= len(lines):  # some in between have left
            index = torch.tensor(lines).to(logits.device, non_blocking=True)
            found = self._state.outcomes[index]
            if any(row.params.logprobs is not None for row in rows):
                logits = self._state.logits[index]
        flat = pack(found, rows, reported_logits(logits, logits, rows))
        read, vocab_size = self._device.fetch(flat), self._state.logits.shape[1]
        return Flight(items, lines, lambda: unpack(read(), rows, vocab_size, failed))

    def _shape(self, items: Sequence[ScheduledItem], lines: int) -> StepShape:
        reach = self.graphs.reach_for(max(item.stop for item in items))
        penalised = any(item.state.row.logit_steps for item in items)
        adapters = None
        if any(item.state.adapters for item in items):
            adapters = self._adapters.write([_adapters_of(holder) for holder in self._holders])
        count = self.graphs.lines_for(lines)
        return StepShape("step", count, reach, penalised, adapters=adapters)

    def _place(
        self, items: Sequence[ScheduledItem], chooses: bool
    ) -> tuple[list[ScheduledItem], list[int]]:
        """Give every request one of the first lines, the one it has where that is possible.

        Args:
            items: one per request.
            chooses: whether the step chooses tokens, and must know what penalties look at.

        Returns: items in order of their lines, and these.
        """
        count = len(items)
        wanted = {item.state: item for item in items}
        at: list[ScheduledItem | None] = [None] * count
        for line in range(count):
            holder = self._holders[line]
            item = wanted.get(holder) if holder is not None else None
            if item is not None and item.start == self._positions[line]:
                at[line] = wanted.pop(holder)
        self._vacate(line for line in range(self._state.lines) if line >= count or at[line] is None)
        free = [line for line in range(count) if at[line] is None]
        for line, item in zip(free, wanted.values()):
            at[line] = item
        self._write(free, [at[line] for line in free])
        if chooses:
            # A window over the last tokens is kept by the host: it forgets some.
            windows = (line for line, item in enumerate(at) if _has_window(item.state))
            self._write_history(sorted({*free, *windows}))
        return at, list(range(count))

    def _vacate(self, lines: Iterable[int]) -> None:
        """Take requests off lines."""
        gone = [line for line in lines if self._positions[line] >= 0]
        for line in gone:
            self._holders[line], self._positions[line] = None, -1
        self._state.deactivate(gone)

    def _write(self, lines: list[int], items: Sequence[ScheduledItem]) -> None:
        """Bring requests to lines."""
        if not lines:
            return
        columns: dict[str, list[float]] = {name: [] for name in _COLUMNS}
        for line, item in zip(lines, items):
            state = item.state
            assert state.row.position == item.stop, "the row is at the token to be chosen"
            self._holders[line], self._positions[line] = state, item.start
            state.held.synced = 0  # its pages are not in this line yet
            history = state.row.history
            settings = asdict(RowSettings.of(state.row, self._state.logits.shape[1]))
            settings["seeds"] = settings.pop("seed")
            settings |= {"input_ids": state.token_ids[item.start], "positions": item.start}
            settings |= {"active": 1, "seen": 0 if history is None else len(history.ids)}
            for name, value in settings.items():
                columns[name].append(value)
        ends = [sorted(item.state.end_token_ids) for item in items]
        self._state.write(lines, columns, ends)

    def _write_history(self, lines: Sequence[int]) -> None:
        """Bring what penalties look at to lines."""
        rows = [(line, self._holders[line].row) for line in lines]
        seen = {line: row.history.penalised() for line, row in rows if row.logit_steps}
        if seen:
            self._state.write_history(list(seen), list(seen.values()))

    def _sync_pages(self, items: Sequence[ScheduledItem], lines: Sequence[int]) -> None:
        """Bring pages that requests have got into their lines."""
        at: list[int] = []
        places: list[int] = []
        pages: list[int] = []
        for item, line in zip(items, lines):
            new = self._builder.sync(item)
            at += [line] * len(new)
            places += new
            pages += item.state.held.pages[new.start : new.stop]
        if at:
            self._state.write_pages(at, places, pages)


def line_runner(
    model: Model,
    pool: KVPool,
    builder: BatchBuilder,
    banned_ids: frozenset[int],
    device: GraphDevice,
    *,
    lines: int,
) -> LineRunner:
    """The runner of a model's decode steps.

    Args:
        model, pool, builder, banned_ids: as for ``ModelRunner``.
        device: records graphs.
        lines: most requests of a step.
    """
    vocab_size = model.config.vocab_size
    state = DecodeState(lines, builder.max_pages, vocab_size, model.device)
    banned = torch.tensor(sorted(banned_ids), device=model.device) if banned_ids else None
    step = DecodeStep(model, pool, state, banned)
    adapters = AdapterLines(builder.layers, lines, model.device, model.dtype, model.numerics)
    graphs = DecodeGraphs(step, state, device, builder.max_pages * pool.page_size, adapters)
    masks = MaskFiller(vocab_size, model.device)
    return LineRunner(state, graphs, device, builder, masks, adapters, banned)


_COLUMNS = (
    *("input_ids", "positions", "active", "seeds", "seen", "top_k", "top_p", "min_p"),
    *("temperature", "repetition", "frequency", "presence"),
)


def _adapters_of(holder: RequestState | None) -> Adapters:
    return () if holder is None else holder.adapters


def _has_window(state: RequestState) -> bool:
    return bool(state.row.logit_steps) and state.request.params.repeat_last_n is not None


def _feeds_itself(state: RequestState, lines: DecodeState) -> bool:
    """Whether a request's next step depends on its tokens in ways that the device follows alone."""
    history = state.row.history
    return (
        state.matcher is None
        and not _has_window(state)
        and (history is None or len(history.ids) + 3 < lines.token_ids.shape[1])
    )
