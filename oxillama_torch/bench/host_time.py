"""What a decode step costs on the host: scheduling, lines, booking, events; no model and no GPU.

Graphs are replaced by nothing at all, and the tokens that are read back are made up. What is left
is the Python that has to be done while a GPU computes one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import GenerationRequest, RequestHandle
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["measure_host"]

_VOCABULARY = 128
_TOKEN = 5


def measure_host(batch_size: int, *, steps: int = 200, prompt_tokens: int = 512) -> dict[str, Any]:
    """Time steady decoding of equal greedy requests.

    Args:
        batch_size: requests.
        steps: timed, after as many as it takes to compute the prompts.
        prompt_tokens: of each request.

    Returns:
        ``host_us``: microseconds of processor time of a step, the median; ``page_us``: of a slow
        one, such as those in which requests get a page; ``calls``: calls of torch in a plain step,
        each of which may give the interpreter's lock away; ``replays`` and ``copies``: launches
        and copies of a step.
    """
    device = _NoGraphs()
    config = EngineConfig(
        device="cpu",
        max_batch_size=batch_size,
        max_batch_tokens=batch_size * prompt_tokens,  # all prompts in one step
        kv_pages=batch_size * (prompt_tokens + 2 * steps + 64) // 32 + batch_size,
        prefix_cache=False,
        graph_prompt_tokens=0,
    )
    engine = Engine(_NoModel(), config, graphs=device)
    params = SamplingParams(temperature=0, seed=0, max_tokens=2 * steps + 32, ignore_eos=True)
    for _ in range(batch_size):
        request = GenerationRequest(prompt_token_ids=(_TOKEN,) * prompt_tokens, params=params)
        engine.add(RequestHandle(request, lambda _: None))
    with torch.inference_mode():
        while engine.stats()["steps_ahead"] < 2:
            engine.step()
        times = [_timed(engine.step) for _ in range(steps)]
        replays, copies = device.replays, device.copies
        engine.step()
        found = {"replays": device.replays - replays, "copies": device.copies - copies}
        with _Counting() as counting:
            engine.step()
    times.sort()
    return {
        "batch_size": batch_size,
        "host_us": times[len(times) // 2] * 1e6,
        "page_us": times[-1 - len(times) // 64] * 1e6,
        "calls": counting.calls,
        **found,
    }


def _timed(function: Callable[[], object]) -> float:
    started = time.thread_time()
    function()
    return time.thread_time() - started


class _Counting(TorchDispatchMode):
    """Counts calls of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class _NoModel:
    """Computes nothing; only prompts ask for it."""

    dtype, device, numerics = torch.float32, torch.device("cpu"), "invariant"
    config = SimpleNamespace(vocab_size=_VOCABULARY, context_length=1 << 16)

    def __call__(self, batch, kv: list) -> torch.Tensor:
        return torch.zeros(len(batch.input_ids), 1)

    def logits(self, hidden: torch.Tensor, adapters=None) -> torch.Tensor:
        return torch.zeros(len(hidden), _VOCABULARY)

    def kv_shapes(self) -> list[tuple[int, int, int]]:
        return [(1, 1, 1)]


class _NoGraphs:
    """Records nothing, replays nothing, and reads back one and the same token."""

    def __init__(self) -> None:
        self.replays = self.copies = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        return self._replay

    def _replay(self) -> None:
        self.replays += 1

    def fetch(self, tensor: torch.Tensor) -> Callable[[], list[float]]:
        self.copies += 1
        return lambda: [_TOKEN, 1.0, 1.0, 1.0, 1.0] * (tensor.numel() // 5)

    def finish(self) -> None:
        pass

    def memory(self) -> int:
        return 0
