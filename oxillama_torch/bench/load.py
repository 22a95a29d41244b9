"""Load on an OpenAI-compatible server, ours or another: streams, and when their tokens arrive."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from oxillama_torch.bench.stream_client import post_stream
from oxillama_torch.errors import EngineError

__all__ = ["Load", "Stream", "apply_load", "first_model", "prompt_of", "summary"]

_WORDS = ("list", "dict", "tuple", "set", "open", "close", "read", "write", "sort", "map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send.

    Args:
        url: of the server, without ``/v1``.
        model: its id.
        concurrency: streams at once.
        requests: in all.
        prompt_words, new_tokens: length of each.
        api_key: bearer key or None.
        extra: further fields of each request, such as ``{"ignore_eos": true}``.
        timeout_s: a request that takes longer counts as failed.
    """

    url: str
    model: str
    concurrency: int
    requests: int
    prompt_words: int = 32
    new_tokens: int = 64
    api_key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


@dataclass(slots=True)
class Stream:
    """One request: seconds (``time.perf_counter``) at which it began and its chunks arrived."""

    started: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


def first_model(url: str, api_key: str | None = None) -> str:
    """Id of the first model that a server lists.

    Raises:
        EngineError: it cannot be reached, or lists none.
    """
    request = urllib.request.Request(f"{url}/v1/models", headers=_headers(api_key))
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["data"][0]["id"]
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise EngineError(f"no model at {url}/v1/models: {error}") from error


def apply_load(
    load: Load, progress: Callable[[int], None] = lambda done: None
) -> dict[str, int | float | str]:
    """Send the requests and wait for their ends.

    Args:
        progress: gets the number of requests that have ended.

    Returns: see ``summary``.
    """
    started = time.perf_counter()
    streams = asyncio.run(_send_all(load, progress))
    return summary(load, streams, time.perf_counter() - started)


def summary(load: Load, streams: Sequence[Stream], seconds: float) -> dict[str, int | float | str]:
    """Figures of a run: requests and tokens per second; milliseconds to the first token and
    between tokens, median and 99th percentile over all of the run."""
    good = [stream for stream in streams if stream.error is None and stream.arrivals]
    first = [1e3 * (s.arrivals[0] - s.started) for s in good]
    gaps = [1e3 * (b - a) for s in good for a, b in zip(s.arrivals, s.arrivals[1:])]
    errors = sorted({stream.error for stream in streams if stream.error})
    facts = {name: value for name, value in asdict(load).items() if name not in ("api_key",)}
    return facts | {
        "failed": len(streams) - len(good),
        "errors": "; ".join(errors[:3]),
        "seconds": seconds,
        "requests_s": len(good) / seconds,
        "tokens_s": sum(stream.tokens for stream in good) / seconds,
        "ttft_p50_ms": _percentile(first, 0.5),
        "ttft_p99_ms": _percentile(first, 0.99),
        "gap_p50_ms": _percentile(gaps, 0.5),
        "gap_p99_ms": _percentile(gaps, 0.99),
        "gap_max_ms": max(gaps, default=float("nan")),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    if len(values) < 2:
        return values[0] if values else float("nan")
    if share == 0.5:
        return statistics.median(values)
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


async def _send_all(load: Load, progress: Callable[[int], None]) -> list[Stream]:
    waiting = iter(range(load.requests))
    streams: list[Stream] = []

    async def worker() -> None:
        for number in waiting:
            streams.append(await _send(load, number))
            progress(len(streams))

    await asyncio.gather(*(worker() for _ in range(load.concurrency)))
    return streams


async def _send(load: Load, number: int) -> Stream:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt_of(load, number)}],
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **load.extra,
    }
    stream = Stream(time.perf_counter())
    url = f"{load.url}/v1/chat/completions"
    try:
        asked = post_stream(url, body, _headers(load.api_key), partial(_take, stream))
        await asyncio.wait_for(asked, load.timeout_s)
    except EngineError as error:
        stream.error = str(error)
    except (OSError, ValueError, asyncio.TimeoutError) as error:  # noqa: UP041 (of its own in 3.10)
        stream.error = f"{type(error).__name__}: {error}"
    if stream.error is None and not stream.tokens:
        stream.error = "the stream has ended without usage"
    return stream


def _take(stream: Stream, chunk: dict[str, Any], now: float) -> None:
    """One event of a stream: a chunk with text, or the usage at the end."""
    if "error" in chunk:
        stream.error = str(chunk["error"].get("message", chunk["error"]))
    elif chunk.get("usage"):
        stream.tokens = chunk["usage"]["completion_tokens"]
    if any((c.get("delta") or {}).get("content") for c in chunk.get("choices", ())):
        stream.arrivals.append(now)


def prompt_of(load: Load, number: int) -> str:
    """Differs from all others from its first word on: none finds another's prefix cached."""
    rng = random.Random(f"{load.concurrency} {number}")
    return " ".join([f"{rng.random():.9f}", *rng.choices(_WORDS, k=load.prompt_words)])


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
