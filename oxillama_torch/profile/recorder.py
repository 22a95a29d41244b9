"""Records every kernel call of a model: which layer, op, backend, how long, how many bytes.

Each call is timed on its own, which keeps the device from overlapping them: shares are meant, not
the rate. On CUDA the clock is a pair of events, on a CPU the host's.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from oxillama_torch.bench.cost import cost_of
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.registry import Call, Kernel

__all__ = ["Record", "Recorder", "recording"]


@dataclass(frozen=True, slots=True)
class Record:
    """One kernel call.

    Args:
        step: number of the engine step it belongs to.
        module: name of the innermost module, such as ``layers.3.attention.output``.
        type: GGML type of the weight, or "".
        m: rows.
        seconds: on the device.
        nbytes, flops: what the call must at least move and compute.
    """

    step: int
    module: str
    op: str
    backend: str
    type: str
    m: int
    seconds: float
    nbytes: int
    flops: int


class Recorder:
    """Collects records while ``recording`` is active."""

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        self._device = device
        self._modules: list[str] = []
        self._records: list[Record] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def records(self) -> list[Record]:
        """Everything recorded so far."""
        if not self._events:
            return list(self._records)
        torch.cuda.synchronize(self._device)
        return [
            replace(record, seconds=start.elapsed_time(end) / 1e3)
            for record, (start, end) in zip(self._records, self._events, strict=True)
        ]

    def enter(self, names: Sequence[str]) -> None:
        """A module begins its forward.

        Args:
            names: all it has; one that layers share has one in each, and the layer's is taken.
        """
        around = f"{self._modules[-1]}." if self._modules else ""
        self._modules.append(next((n for n in names if n.startswith(around)), names[0]))

    def leave(self) -> None:
        """The module entered last has ended its forward."""
        self._modules.pop()

    def observe(self, kernel: Kernel, call: Call) -> Kernel:
        """The kernel, wrapped so that its next call is recorded."""

        def timed(*args, **kwargs):
            before = len(self._records)
            seconds, events, out = self._time(lambda: kernel.function(*args, **kwargs))
            if len(self._records) > before:
                return out  # it has called other ops, which have been recorded
            self._events += events
            nbytes, flops = cost_of(kernel.op, args, out)
            module = self._modules[-1] if self._modules else ""
            type_name = call.type or ""
            self._records.append(
                Record(
                    self.step,
                    module,
                    kernel.op,
                    kernel.backend,
                    type_name,
                    call.m,
                    seconds,
                    nbytes,
                    flops,
                )  # fmt: skip
            )
            return out

        return replace(kernel, function=timed)

    def _time(self, run: Callable[[], object]) -> tuple[float, list, object]:
        """(seconds on a CPU, the pair of events on a GPU, what ``run`` returns)."""
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            out = run()
            end.record()
            return 0.0, [(start, end)], out
        started = time.perf_counter()
        out = run()
        return time.perf_counter() - started, [], out


@contextlib.contextmanager
def recording(model: nn.Module, device: torch.device) -> Iterator[Recorder]:
    """Record every kernel call of ``model`` for the duration of a block."""
    recorder = Recorder(device)
    hooks, names = [], defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names[module].append(name)
    for module, its in names.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, its=its: recorder.enter(its)))
        hooks.append(module.register_forward_hook(lambda *_: recorder.leave()))
    try:
        with registry.observed(recorder.observe):
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()
