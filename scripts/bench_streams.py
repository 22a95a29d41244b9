#!/usr/bin/env python3
"""How many streams one server process carries: a paced engine without a model, and real sockets.

    python scripts/bench_streams.py --streams 1000 --rate 50 --seconds 15

The server's process has the real worker, output thread, tokenizer and routes; in place of the
model an engine that gives every stream a token, ``--rate`` times a second. Reported: how much of
that pace is kept (against the same engine with nobody listening), the gaps between a stream's
tokens as its client sees them, and memory per stream. The client is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import selectors
import socket
import sys
import threading
import time
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402
from flask import Flask  # noqa: E402

from oxillama_torch.config import EngineConfig, ServerConfig, demo_model_path  # noqa: E402
from oxillama_torch.engine.request import (  # noqa: E402
    FinishEvent,
    PromptEvent,
    RequestHandle,
    TokenEvent,
)
from oxillama_torch.gguf.reader import read_gguf  # noqa: E402
from oxillama_torch.server.app import create_app  # noqa: E402
from oxillama_torch.server.run import Application  # noqa: E402
from oxillama_torch.server.service import Service  # noqa: E402
from oxillama_torch.tokenizer.tokenizer import Tokenizer  # noqa: E402

_TOKEN = 300


class PacedEngine:
    """Gives every request a token per step, at a fixed pace, from one thread."""

    alive, max_context, vocab_size, adapters, pooling = True, 100_000, 1000, None, None

    def __init__(self, rate: float) -> None:
        self._period = 1 / rate
        self._handles: dict[str, RequestHandle] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self.steps = 0
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request, sink=None) -> RequestHandle:
        handle = RequestHandle(request, self.cancel, sink)
        handle.put(PromptEvent(len(request.prompt_token_ids), 0))
        with self._lock:
            self._counts[request.request_id] = 0
            self._handles[request.request_id] = handle
        return handle

    def cancel(self, request_id: str) -> None:
        with self._lock:
            self._handles.pop(request_id, None)

    def stats(self) -> dict:
        return {"running": len(self._handles), "waiting": 0, "steps": self.steps}

    def stop(self) -> None:
        self.alive = False

    def _run(self) -> None:
        due = time.perf_counter()
        while self.alive:
            with self._lock:
                handles = list(self._handles.values())
            for handle in handles:
                self._give(handle)
            self.steps += 1
            due = max(due + self._period, time.perf_counter() - self._period)
            time.sleep(max(0.0, due - time.perf_counter()))

    def _give(self, handle: RequestHandle) -> None:
        count = self._counts[handle.request_id] = self._counts[handle.request_id] + 1
        handle.put(TokenEvent(_TOKEN))
        if count == handle.request.params.max_tokens:
            self.cancel(handle.request_id)
            handle.put(FinishEvent("length", count))


def solo_pace(rate: float, streams: int, seconds: float) -> float:
    """Steps per second with as many requests and nobody who listens."""
    engine = PacedEngine(rate)
    for number in range(streams):
        handle = RequestHandle(_Request(number), engine.cancel, lambda request_id, event: None)
        engine._counts[handle.request_id] = 0
        engine._handles[handle.request_id] = handle
    before = engine.steps
    time.sleep(seconds)
    engine.stop()
    return (engine.steps - before) / seconds


class _Request:
    """What the engine reads of a request."""

    class params:  # noqa: N801
        max_tokens = None

    def __init__(self, number: int) -> None:
        self.request_id = f"solo-{number}"


class PacedApplication(Application):
    """The server without its words of welcome, which are about a model."""

    def load(self) -> Flask:
        return create_app(self._server, self._open_llm(self._engine))


def run_server(port: int, streams: int, rate: float) -> None:
    """Serve with the paced engine until killed."""

    def open_service(_: EngineConfig) -> Service:
        with read_gguf(demo_model_path()) as gguf:
            tokenizer = Tokenizer.from_gguf(gguf.metadata)
        return Service("paced", PacedEngine(rate), tokenizer, None, server, "fp_paced")

    server = ServerConfig(port=port, max_streams=streams + 16)
    PacedApplication(server, EngineConfig(), open_service).run()


def stream_all(port: int, streams: int, tokens: int) -> dict:
    """Open all streams, read them to their ends. Returns arrival times by stream."""
    body = json.dumps({"model": "paced", "prompt": [1, 2], "stream": True, "max_tokens": tokens})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n{body}".encode()
    selector = selectors.EpollSelector()
    arrivals: dict[int, list[float]] = {}
    for number in range(streams):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(request)
        sock.setblocking(False)
        arrivals[number] = []
        selector.register(sock, selectors.EVENT_READ, number)
    left, chunks = streams, 0
    while left:
        for key, _ in selector.select(20):
            data = key.fileobj.recv(1 << 16)
            if b'"text":' in data:
                chunks += data.count(b'"text":')
                arrivals[key.data].append(time.perf_counter())
            if not data or b"[DONE]" in data:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1
    return {"arrivals": arrivals, "chunks": chunks}


def main() -> None:
    """Run both sides and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    solo = solo_pace(options.rate, options.streams, 3.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_server, args=(port, options.streams, options.rate))
    process.start()
    try:
        _wait(port)
        worker = max(psutil.Process(process.pid).children(), key=lambda p: p.memory_info().rss)
        before = worker.memory_info().rss
        peak = [before]
        threading.Thread(target=_watch, args=(worker, peak), daemon=True).start()
        found = stream_all(port, options.streams, int(options.rate * options.seconds))
    finally:
        process.terminate()
        process.join(30)
    _report(found["arrivals"], solo, options, (peak[0] - before) / options.streams)


def _watch(worker: psutil.Process, peak: list[int]) -> None:
    while worker.is_running():
        try:
            peak[0] = max(peak[0], worker.memory_info().rss)
        except psutil.NoSuchProcess:
            return
        time.sleep(0.2)


def _report(
    arrivals: dict[int, list[float]], solo: float, options: argparse.Namespace, memory: float
) -> None:
    """Of the time in which all streams were open."""
    start = max(times[0] for times in arrivals.values())
    stop = min(times[-1] for times in arrivals.values())
    gaps = []
    for times in arrivals.values():
        inside = [t for t in times if start <= t <= stop]
        gaps += [b - a for a, b in zip(inside, inside[1:])]
    # A stream gets its tokens one by one or, behind a slow server, several in one piece.
    pieces = len(gaps) / (stop - start) / options.streams
    longest = [max(b - a for a, b in zip(times, times[1:])) for times in arrivals.values()]
    print(f"streams {options.streams}, pace {options.rate:g} tokens/s each")
    print(f"engine alone: {solo:.1f} steps/s")
    print(f"pieces per stream and second: {pieces:.1f} ({pieces / solo:.0%} of the engine alone)")
    p = quantiles(gaps, n=1000)
    print(f"gap ms: median {median(gaps) * 1e3:.1f}, p99 {p[989] * 1e3:.1f}, "
          f"p99.9 {p[998] * 1e3:.1f}, longest {max(longest) * 1e3:.0f}")  # fmt: skip
    print(f"memory per stream: {memory / 1024:.0f} KiB")


def _wait(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server has not started")


if __name__ == "__main__":
    main()
