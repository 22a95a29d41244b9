"""``/metrics``: what is counted per request here, and what engines count, read when asked for.

Names are OxiLLaMa's where it has one; those of llama-server follow with its prefix.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.pool import Services

__all__ = ["GAP_BOUNDS_S", "Metrics"]

#: Upper bounds of the classes of times between tokens.
GAP_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

# Engine figure -> metric and what it says; the first are totals, the second states.
_COUNTERS = {
    "prompt_tokens": ("oxillama_prompt_tokens", "Prompt tokens computed."),
    "generated_tokens": ("oxillama_tokens_generated", "Tokens generated."),
    "prefix_hit_tokens": ("oxillama_prefix_hit_tokens", "Prompt tokens found in the cache."),
    "preemptions": ("oxillama_preemptions", "Requests set back for want of pages."),
    "sampled_by_op": ("oxillama_sampled_by_op", "Tokens chosen by the sample op."),
    "sampled_by_chain": ("oxillama_sampled_by_chain", "Tokens chosen by the sampling chain."),
    "graph_steps": ("oxillama_graph_steps", "Steps replayed from CUDA graphs."),
    "graph_prompts": ("oxillama_graph_prompts", "Steps with a short prompt that were replayed."),
    "steps_ahead": ("oxillama_steps_ahead", "Of these, launched before the last one was read."),
    "proposed_tokens": ("oxillama_proposed_tokens", "Tokens guessed ahead."),
    "accepted_tokens": ("oxillama_accepted_tokens", "Guesses that were right."),
    "speculated_items": ("oxillama_speculated_items", "Checks of a request's guesses."),
    "proposer_failures": ("oxillama_proposer_failures", "Steps whose guessing failed."),
    "swapped_out": ("oxillama_swapped_out", "Requests whose pages went to host memory."),
    "swapped_in": ("oxillama_swapped_in", "Requests whose pages came back from there."),
    "swap_refused": ("oxillama_swap_refused", "Requests computed again: host memory was full."),
    "steps": ("oxillama_steps", "Steps computed."),
    "step_seconds": ("oxillama_step_seconds", "Time spent in steps."),
    "step_failures": ("oxillama_step_failures", "Steps whose batch had to be taken apart."),
    "finished": ("oxillama_engine_finished", "Engine requests that ended by themselves."),
    "cancelled": ("oxillama_engine_cancelled", "Engine requests dropped."),
    "failed": ("oxillama_engine_failed", "Engine requests that failed."),
}
_GAUGES = {
    "running": ("oxillama_batch_size", "Requests in the running batch."),
    "waiting": ("oxillama_queue_depth", "Requests that wait to run."),
    "pages": ("oxillama_kv_pages", "KV pages there are."),
    "pages_used": ("oxillama_kv_pages_used", "KV pages of running requests."),
    "pages_cached": ("oxillama_kv_pages_cached", "Free KV pages that hold a known prefix."),
    "graphs": ("oxillama_graphs", "CUDA graphs at hand."),
    "graph_bytes": ("oxillama_graph_bytes", "Memory of CUDA graphs and of what they work on."),
    "swap_pages": ("oxillama_swap_pages", "Pages that host memory has room for."),
    "swap_pages_used": ("oxillama_swap_pages_used", "Pages that wait in host memory."),
    "alive": ("oxillama_engine_alive", "1 while the engine serves."),
}
# llama-server's names, of the sum over all models.
_LLAMACPP_COUNTERS = {
    "prompt_tokens": "llamacpp:prompt_tokens",
    "prefix_hit_tokens": "llamacpp:prompt_tokens_cached",
    "generated_tokens": "llamacpp:tokens_predicted",
    "steps": "llamacpp:n_decode",
}
_LLAMACPP_GAUGES = {
    "running": "llamacpp:requests_processing",
    "waiting": "llamacpp:requests_deferred",
}


class Metrics:
    """All metrics of one application, in a registry of its own. Thread-safe."""

    def __init__(self, services: Services, lifecycle: Lifecycle) -> None:
        self._services, self._lifecycle = services, lifecycle
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "oxillama_requests",
            "HTTP requests answered.",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self._errors = Counter(
            "oxillama_errors",
            "Errors told to clients, inside streams too.",
            ("code",),
            registry=self._registry,
        )
        self._duration = Histogram(
            "oxillama_request_duration_seconds",
            "From a request to the end of its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "oxillama_time_to_first_token_seconds",
            "From a request to the first token of a choice.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._lock = threading.Lock()
        self._gaps = [0] * (len(GAP_BOUNDS_S) + 1)
        self._gap_seconds = 0.0
        self.started_at = time.time()
        self._registry.register(self)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """A request's answer has been sent."""
        self._requests.labels(endpoint, str(status)).inc()
        self._duration.labels(endpoint).observe(seconds)

    def error(self, code: str) -> None:
        """A client was told of an error."""
        self._errors.labels(code).inc()

    def book(
        self, first_tokens: list[float], gaps: list[int], gap_seconds: float, errors: list[str]
    ) -> None:
        """Add what one request has counted: seconds, and numbers of gaps per class."""
        for seconds in first_tokens:
            self._first_token.observe(seconds)
        for code in errors:
            self.error(code)
        if gap_seconds:
            with self._lock:
                self._gaps = [a + b for a, b in zip(self._gaps, gaps, strict=True)]
                self._gap_seconds += gap_seconds

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not call ``collect`` to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What is read at the moment of asking."""
        yield self._gap_histogram()
        yield GaugeMetricFamily(
            "oxillama_active_requests",
            "HTTP requests being answered by a model.",
            self._lifecycle.in_progress,
        )
        stats = {s.model_id: s.engine.stats() for s in self._services.ready()}
        for key, (name, text) in _COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=("model",))
            for model, figures in stats.items():
                family.add_metric((model,), figures.get(key, 0))
            yield family
        for key, (name, text) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=("model",))
            for model, figures in stats.items():
                gauge.add_metric((model,), figures.get(key, 0))
            yield gauge
        for key, name in _LLAMACPP_COUNTERS.items():
            total = sum(figures.get(key, 0) for figures in stats.values())
            yield CounterMetricFamily(name, f"As llama-server's: {key}.", total)
        for key, name in _LLAMACPP_GAUGES.items():
            total = sum(figures.get(key, 0) for figures in stats.values())
            yield GaugeMetricFamily(name, f"As llama-server's: {key}.", total)

    def _gap_histogram(self) -> Metric:
        with self._lock:
            gaps, seconds = self._gaps, self._gap_seconds
        buckets, total = [], 0
        for bound, count in zip((*map(str, GAP_BOUNDS_S), "+Inf"), gaps, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(
            "oxillama_inter_token_latency_seconds",
            "Between two tokens of a choice.",
            buckets=buckets,
            sum_value=seconds,
        )
