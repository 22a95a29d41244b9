"""The graphs of an engine: made at the start, made again when what they hold has changed."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable

from oxillama_torch.engine.adapter_lines import AdapterLines
from oxillama_torch.engine.decode_state import DecodeState
from oxillama_torch.engine.decode_step import DecodeStep
from oxillama_torch.engine.graphs import GraphDevice, StepShape, line_counts, reaches

__all__ = ["DecodeGraphs"]

log = logging.getLogger(__name__)


class DecodeGraphs:
    """Graphs by shape.

    Args:
        step: what they record.
        state: the lines.
        device: records and replays.
        max_context: most tokens of a line.
        adapters: those of the lines.

    Attributes:
        captured: graphs recorded since the start.
    """

    def __init__(
        self,
        step: DecodeStep,
        state: DecodeState,
        device: GraphDevice,
        max_context: int,
        adapters: AdapterLines,
    ) -> None:
        self._step, self._state, self._device, self._adapters = step, state, device, adapters
        self._counts, self._reaches = line_counts(state.lines), reaches(max_context)
        self._graphs: dict[StepShape, Callable[[], None]] = {}
        self.captured = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def lines_for(self, count: int) -> int:
        """The least number of lines that graphs are made for and that holds ``count``."""
        return self._counts[bisect.bisect_left(self._counts, count)]

    def reach_for(self, tokens: int) -> int:
        """The least reach that graphs are made for and that holds ``tokens``."""
        return self._reaches[bisect.bisect_left(self._reaches, tokens)]

    def shapes(self) -> list[StepShape]:
        """What is recorded at the start, the largest first: plain steps; others when wanted."""
        return [
            StepShape("step", lines, reach)
            for reach in reversed(self._reaches)
            for lines in reversed(self._counts)
        ]

    def capture(self, shape: StepShape) -> None:
        """Record one of ``shapes``."""
        self._graph(shape)

    def drop(self) -> None:
        """Forget all graphs: weights or kernels are others now."""
        if self._graphs:
            self._device.finish()
            self._graphs.clear()

    def replay(self, shape: StepShape) -> None:
        """Launch a step, or a part of one."""
        self._graph(shape)()

    def _graph(self, shape: StepShape) -> Callable[[], None]:
        graph = self._graphs.get(shape)
        if graph is None:
            log.debug("capturing %s", shape)
            self._drop_outgrown(shape)
            graph = self._graphs[shape] = self._capture(shape)
            self.captured += 1
        return graph

    def _drop_outgrown(self, shape: StepShape) -> None:
        """Forget graphs for fewer layers or smaller ranks of adapters: nobody asks for them now."""
        if shape.adapters is None:
            return
        now = shape.adapters._replace(rounds=0)
        gone = [s for s in self._graphs if s.adapters and s.adapters._replace(rounds=0) != now]
        if gone:
            self._device.finish()
        for old in gone:
            del self._graphs[old]

    def _capture(self, shape: StepShape) -> Callable[[], None]:
        active = self._state.column("active")
        before = active.clone()
        active.zero_()  # recording runs the step once, which must leave all lines as they are
        try:
            return self._device.capture(lambda: self._run(shape))
        finally:
            active.copy_(before)

    def _run(self, shape: StepShape) -> None:
        if shape.part != "choose":
            adapters = shape.adapters
            if adapters is not None:
                adapters = self._adapters.batch(adapters, shape.lines)
            self._step.forward(shape.lines, shape.reach, adapters)
        if shape.part != "forward":
            self._step.choose(shape.lines, penalised=shape.penalised, masked=shape.masked)
