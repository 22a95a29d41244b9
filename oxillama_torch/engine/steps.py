"""Computing steps: on lines and one ahead where that can be, kernel by kernel where not.

Whatever a step raises is narrowed down to the requests that are to blame.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from oxillama_torch.engine.model_runner import ItemResult, ModelRunner
from oxillama_torch.engine.run_ahead import Flight, LineRunner
from oxillama_torch.engine.scheduler import Scheduler
from oxillama_torch.engine.speculation.speculator import Speculator, without_guesses
from oxillama_torch.engine.state import RequestState, ScheduledBatch
from oxillama_torch.engine.stats import Counters
from oxillama_torch.errors import EngineError

__all__ = ["Steps"]

log = logging.getLogger(__name__)

Results = Mapping[RequestState, ItemResult]


class Steps:
    """Computes what the scheduler decides, step by step.

    Args:
        scheduler: decides.
        runner: computes any step.
        lines: computes steps that only decode; None: there are no graphs.
        counters: of failures.
        speculator: adds guesses; None: nothing does.

    Attributes:
        speculator: as given.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        lines: LineRunner | None,
        counters: Counters,
        speculator: Speculator | None = None,
    ) -> None:
        self._scheduler, self._runner, self._lines = scheduler, runner, lines
        self._counters, self.speculator = counters, speculator
        self._flight: Flight | None = None

    def next(self) -> tuple[ScheduledBatch, Results]:
        """The step that comes next, and what it brought; empty where there is nothing to do.

        Where it can be decided already, the step behind it is launched before this one is read.

        Raises:
            torch.AcceleratorError: the device is beyond use.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            batch = self._scheduler.schedule()
            self._runner.swap(batch)
            if self.speculator is not None:
                batch = self.speculator.add_guesses(batch)
            if self._lines is not None and self._lines.serves(batch):
                flight = self._launched(lambda: self._lines.launch(batch))
            if flight is None:
                return self._compute(batch) if batch.items else (batch, {})
        # What a request says next is to be known before its guesses are made.
        if self.speculator is None and self._lines.runs_ahead(flight):
            after = self._scheduler.schedule_after(flight.batch)
            if after is not None:
                self._flight = self._launched(lambda: self._lines.launch_after(flight, after))
        results = self._lines.collect(flight)
        # Some may have been cancelled since it was launched.
        left = tuple(item for item in flight.items if item.state.slot is not None)
        return ScheduledBatch(left), results

    def _launched(self, launch: Callable[[], Flight | None]) -> Flight | None:
        """A flight; None, and an entry in the log, where launching it failed."""
        try:
            return launch()
        except torch.AcceleratorError:
            raise  # every later call on this device fails too
        except Exception:
            self._counters.step_failures += 1
            log.exception("a step could not be launched on lines")
            self._lines.reset()
            return None

    def _compute(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, Results]:
        """Run a batch; if that raises, run its requests one by one to find the guilty one.

        Returns: what was computed: without guesses, if that was what could not be.
        """
        try:
            return batch, self._runner.run(batch)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._counters.step_failures += 1
            log.exception("a step of %d requests failed", len(batch.items))
            if any(item.guesses for item in batch.items):
                return self._compute(without_guesses(batch))
            if len(batch.items) == 1:
                return batch, {batch.items[0].state: _failure(error)}
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        results: dict[RequestState, ItemResult] = {}
        for item in batch.items:
            try:
                results.update(self._runner.run(ScheduledBatch((item,))))
            except torch.AcceleratorError:
                raise
            except Exception as error:
                log.exception("request %s failed alone too", item.state.request.request_id)
                results[item.state] = _failure(error)
        return batch, results


def _failure(error: Exception) -> ItemResult:
    failure = EngineError("the model failed on this request")
    failure.__cause__ = error
    return ItemResult(error=failure)
