"""Time the real engine from submitted token ids to token events: prefill, first token, decode."""

from __future__ import annotations

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oxillama_torch.bench.adapters import add_random_adapters
from oxillama_torch.bench.memory import MemoryWatch
from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.request import GenerationRequest, RequestHandle, TokenEvent
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.llm import LLM
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["Stopwatch", "measure_engine", "measure_model"]


def measure_model(
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    runs: int = 3,
    adapters: int = 0,
    rank: int = 16,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Load a model, run once to warm up and ``runs`` times to measure.

    With adapters, each run is followed by one without them, for the cost side by side.

    Args:
        batch_size: equal requests at once.
        prompt_tokens, new_tokens: of each request.
        adapters, rank: so many random adapters on all linear layers, which requests use in turn.
        progress: called with (runs done, runs in all), the first one being the warm-up.
        options: fields of EngineConfig.

    Returns: the settings, ``load_s``, of it ``graphs_s`` for recording CUDA graphs, how many those
        are, the bytes they take, and the medians that ``measure_engine`` gives; with adapters
        ``bare_decode_tok_s`` too, and ``adapter_cost``: the share by which decoding takes longer;
        with speculation ``proposed`` tokens, the ``accepted_share`` of them, and
        ``tokens_per_check``: what a step brings a request that had guesses. All three over all
        runs, the warm-up too. On a GPU and without adapters, what ``MemoryWatch`` says.
    """
    # Random prompts share no prefix, but a later run must not meet the pages of an earlier one.
    config = EngineConfig(
        **{"model": Path(path), "max_batch_size": batch_size, "prefix_cache": False} | options
    )
    watch = MemoryWatch(config)
    started = time.perf_counter()
    recorded = [0.0, 0.0]
    with LLM.from_config(config, *_watched(recorded)) as llm:
        load_s = time.perf_counter() - started
        stats = llm.engine.stats()
        names = add_random_adapters(llm.engine.adapters, adapters, rank)
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        timings = []
        for run in range(runs + 1):
            sizes |= {"batch_size": batch_size, "seed": run}
            timings.append(measure_engine(llm.engine, adapters=names, **sizes))
            if names:
                bare = measure_engine(llm.engine, **sizes)
                timings[-1]["bare_decode_tok_s"] = bare["decode_tok_s"]
            if progress is not None:
                progress(run + 1, runs + 1)
        about = llm.describe()
        memory = {} if names else watch.figures(stats["pages"] * stats["page_size"])
        guesses = _guesses(llm.engine.stats()) if config.speculation != "none" else {}
    row = {
        "model": Path(path).name,
        "engine": about,
        "batch_size": batch_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "adapters": adapters,
        "runs": runs,
        "load_s": load_s,
        "graphs_s": recorded[1] - recorded[0],
        "num_graphs": stats["graphs"],
        "graph_bytes": stats["graph_bytes"],
    }
    return row | _medians(timings[1:]) | guesses | memory


def _guesses(stats: dict[str, int | float]) -> dict[str, float]:
    """What became of guesses, by an engine's counters."""
    proposed, accepted = stats["proposed_tokens"], stats["accepted_tokens"]
    return {
        "proposed": proposed,
        "accepted_share": accepted / proposed if proposed else 0.0,
        "tokens_per_check": 1 + accepted / max(stats["speculated_items"], 1),
    }


def _watched(times: list[float]) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    """Callbacks that keep when the last weight came and when the last graph was recorded."""

    def loaded(done: int, total: int) -> None:
        times[:] = [time.perf_counter()] * 2

    def recording(done: int, total: int) -> None:
        times[1] = time.perf_counter()

    return loaded, recording


def _medians(timings: list[dict[str, float]]) -> dict[str, float]:
    """Medians by name; with figures of runs without adapters, what adapters cost."""
    medians = {name: statistics.median(run[name] for run in timings) for name in timings[0]}
    if "bare_decode_tok_s" in medians:
        medians["adapter_cost"] = medians["bare_decode_tok_s"] / medians["decode_tok_s"] - 1
    return medians


def measure_engine(
    engine: EngineThread,
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    adapters: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, float]:
    """One round of equal requests, submitted at once; with adapters, each has one of them.

    Returns:
        ``ttft_s``: seconds to the first token, mean over the requests;
        ``prefill_tok_s``: all prompt tokens / seconds until every request has its first token;
        ``decode_tok_s``: tokens per second, of all requests together, from then on.
    """
    rng = random.Random(seed)
    watch = Stopwatch(batch_size)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, seed=0)
    for index in range(batch_size):
        ids = tuple(rng.randrange(engine.vocab_size) for _ in range(prompt_tokens))
        own = ((adapters[index % len(adapters)], 1.0),) if adapters else ()
        request = GenerationRequest(prompt_token_ids=ids, params=params, adapters=own)
        watch.watch(engine.submit(request))
    return watch.wait(prompt_tokens)


class Stopwatch:
    """When the tokens of several requests arrived."""

    def __init__(self, requests: int) -> None:
        self._started = time.perf_counter()
        self._times: list[list[float]] = []
        self._threads: list[threading.Thread] = []
        self._expected = requests

    def watch(self, handle: RequestHandle) -> None:
        """Consume a request's events in a thread of its own, which sleeps between them."""
        times: list[float] = []
        self._times.append(times)

        def consume() -> None:
            for event in handle.events():
                if isinstance(event, TokenEvent):
                    times.append(time.perf_counter())

        thread = threading.Thread(target=consume, name="bench-stopwatch")
        self._threads.append(thread)
        thread.start()

    def wait(self, prompt_tokens: int) -> dict[str, float]:
        """Wait for all of them and sum up; see ``measure_engine``."""
        for thread in self._threads:
            thread.join()
        assert len(self._times) == self._expected and all(self._times), "a request gave no token"
        first = [times[0] for times in self._times]
        decoding, end = max(first), max(times[-1] for times in self._times)
        later = sum(at > decoding for times in self._times for at in times)
        return {
            "ttft_s": statistics.mean(first) - self._started,
            "prefill_tok_s": prompt_tokens * len(first) / (decoding - self._started),
            "decode_tok_s": later / (end - decoding) if later else 0.0,
        }
