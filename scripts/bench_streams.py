#!/usr/bin/env python3
"""How many streams one server process carries: a paced engine without a model, and real sockets.

    python scripts/bench_streams.py --streams 1000 --rate 50 --seconds 15

The server's process has the real worker, output thread, tokenizer and routes; in place of the
model an engine that gives every stream a token, ``--rate`` times a second. Measured once all
streams are open: the engine's pace and the tokens that arrive (against the same engine with nobody
listening), the gaps between a stream's pieces as its client sees them, processor time of both
sides, and memory per stream. The client is a process of its own and shares the processors.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import contextlib
import json
import multiprocessing
import select
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from array import array
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil  # noqa: E402
from flask import Flask  # noqa: E402

from oxillama_torch.config import EngineConfig, ServerConfig, demo_model_path  # noqa: E402
from oxillama_torch.engine.outbox import Outbox, deliver  # noqa: E402
from oxillama_torch.engine.request import (  # noqa: E402
    GenerationRequest,
    PromptEvent,
    RequestHandle,
    TokenEvent,
)
from oxillama_torch.gguf.reader import read_gguf  # noqa: E402
from oxillama_torch.sampling.params import SamplingParams  # noqa: E402
from oxillama_torch.server.app import create_app  # noqa: E402
from oxillama_torch.server.run import Application  # noqa: E402
from oxillama_torch.server.service import Service  # noqa: E402
from oxillama_torch.tokenizer.tokenizer import Tokenizer  # noqa: E402

# A token of the demo model, and its text, which is nowhere else in a stream: one chunk may have
# the texts of several tokens.
_TOKEN, _TEXT = 700, b" has"
_OPEN_S, _SETTLE_S = 60.0, 2.0


class PacedEngine:
    """Gives every request a token per step, at a fixed pace, until its client hangs up."""

    alive, max_context, vocab_size, adapters, pooling = True, 100_000, 1000, None, None

    def __init__(self, rate: float, steps: Synchronized | None = None) -> None:
        self._period, self._shared = 1 / rate, steps
        self._handles: dict[str, RequestHandle] = {}
        self._lock = threading.Lock()
        self.steps = 0
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, request, outbox=None) -> RequestHandle:
        handle = RequestHandle(request, self.cancel, outbox)
        handle.put(PromptEvent(len(request.prompt_token_ids), 0))
        with self._lock:
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
            deliver([(handle, TokenEvent(_TOKEN)) for handle in handles])
            self.steps += 1
            if self._shared is not None:
                self._shared.value = self.steps
            due = max(due + self._period, time.perf_counter() - self._period)
            time.sleep(max(0.0, due - time.perf_counter()))


def solo_pace(rate: float, streams: int, seconds: float) -> float:
    """Steps per second with as many requests and nobody who listens."""
    engine, unread = PacedEngine(rate), Outbox()
    unread.notify(lambda _: unread.take(), None)
    for _ in range(streams):
        request = GenerationRequest(prompt_token_ids=(1,), params=SamplingParams())
        handle = RequestHandle(request, engine.cancel, unread)
        engine._handles[handle.request_id] = handle
    before = engine.steps
    time.sleep(seconds)
    engine.stop()
    return (engine.steps - before) / seconds


class PacedApplication(Application):
    """The server without its words of welcome, which are about a model."""

    def load(self) -> Flask:
        return create_app(self._server, self._open_llm(self._engine))


def run_server(port: int, streams: int, make_engine: Callable[[], PacedEngine]) -> None:
    """Serve with a paced engine until killed."""

    def open_service(_: EngineConfig) -> Service:
        with read_gguf(demo_model_path()) as gguf:
            tokenizer = Tokenizer.from_gguf(gguf.metadata)
        return Service("paced", make_engine(), tokenizer, None, server, "fp_paced")

    server = ServerConfig(port=port, max_streams=streams + 16)
    PacedApplication(server, EngineConfig(), open_service).run()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Clients:
    """All streams, read in one thread; counts as cheaply as it can, for the server's sake."""

    def __init__(self, port: int, streams: int) -> None:
        body = json.dumps(
            {"model": "paced", "prompt": [1, 2], "stream": True, "max_tokens": 90_000}
        )
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        request = f"{head}Content-Type: application/json\r\n\r\n{body}".encode()
        self._epoll = select.epoll()
        self._socks: dict[int, socket.socket] = {}
        self.arrivals: dict[int, array] = {}
        self.tokens = 0
        for _ in range(streams):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.sendall(request)
            sock.setblocking(False)
            self._socks[sock.fileno()] = sock
            self.arrivals[sock.fileno()] = array("d")
            self._epoll.register(sock, select.EPOLLIN)

    def read(self, until: float) -> None:
        """Read until then (``time.perf_counter``)."""
        buffer = bytearray(1 << 16)
        view = memoryview(buffer)
        readers = {fd: sock.recv_into for fd, sock in self._socks.items()}
        while (now := time.perf_counter()) < until:
            for fd, _ in self._epoll.poll(until - now, 4096):
                size = readers[fd](view)
                if not size:
                    raise SystemExit("a stream has ended early")
                # A cut inside of the pattern would be missed: pieces are not cut here.
                tokens = buffer.count(_TEXT, 0, size)
                if tokens:
                    self.tokens += tokens
                    self.arrivals[fd].append(time.perf_counter())

    @property
    def open(self) -> bool:
        """Whether every stream has got a token."""
        return all(self.arrivals.values())

    def forget(self) -> None:
        """Count from here on."""
        self.tokens = 0
        self.arrivals = {fd: array("d") for fd in self.arrivals}

    def close(self) -> None:
        """Hang up."""
        for sock in self._socks.values():
            sock.close()


def main() -> None:
    """Run both sides and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=15.0)
    options = parser.parse_args()
    solo = solo_pace(options.rate, options.streams, 3.0)
    port = free_port()
    context = multiprocessing.get_context("fork")
    steps = context.Value("Q", 0, lock=False)
    make_engine = partial(PacedEngine, options.rate, steps)
    process = context.Process(target=run_server, args=(port, options.streams, make_engine))
    process.start()
    try:
        wait_for_health(port)
        worker = max(psutil.Process(process.pid).children(), key=lambda p: p.memory_info().rss)
        found = measure(worker, port, options, steps)
    finally:
        process.terminate()
        process.join(30)
    report(found, solo, options)


def measure(
    worker: psutil.Process, port: int, options: argparse.Namespace, steps: Synchronized
) -> dict:
    """Open the streams, let them settle, and read them for the time asked for."""
    before = worker.memory_info().rss
    clients = Clients(port, options.streams)
    opened = time.perf_counter()
    while not clients.open:
        clients.read(time.perf_counter() + 0.5)
        if time.perf_counter() > opened + _OPEN_S:
            raise SystemExit("not all streams have begun")
    opening = time.perf_counter() - opened
    clients.read(time.perf_counter() + _SETTLE_S)
    clients.forget()
    used, used_here, made = _cpu(worker), time.process_time(), steps.value
    threads = _threads(worker)
    started = time.perf_counter()
    clients.read(started + options.seconds)
    seconds = time.perf_counter() - started
    found = {
        "opening": opening,
        "steps": (steps.value - made) / seconds,
        "tokens": clients.tokens / options.streams / seconds,
        "pieces": sum(map(len, clients.arrivals.values())) / options.streams / seconds,
        "gaps": [b - a for times in clients.arrivals.values() for a, b in zip(times, times[1:])],
        "server": (_cpu(worker) - used) / seconds,
        "threads": sorted(
            (
                ((u - threads[i][0]) / seconds, (s - threads[i][1]) / seconds)
                for i, (u, s) in _threads(worker).items()
                if i in threads
            ),
            key=sum,
            reverse=True,
        )[:2],
        "client": (time.process_time() - used_here) / seconds,
        "memory": (worker.memory_info().rss - before) / options.streams,
    }
    clients.close()
    return found


def _threads(process: psutil.Process) -> dict[int, tuple[float, float]]:
    return {thread.id: (thread.user_time, thread.system_time) for thread in process.threads()}


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def report(found: dict, solo: float, options: argparse.Namespace) -> None:
    """Print the figures."""
    print(f"streams {options.streams}, pace {options.rate:g} tokens/s each, "
          f"open after {found['opening']:.1f} s")  # fmt: skip
    print(f"engine alone: {solo:.1f} steps/s; serving: {found['steps']:.1f} "
          f"({found['steps'] / solo:.0%})")  # fmt: skip
    print(f"per stream and second: {found['tokens']:.1f} tokens ({found['tokens'] / solo:.0%}) "
          f"in {found['pieces']:.1f} pieces ({found['pieces'] / solo:.0%})")  # fmt: skip
    gaps = found["gaps"]
    p = quantiles(gaps, n=1000)
    print(f"gap ms: median {median(gaps) * 1e3:.1f}, p99 {p[989] * 1e3:.1f}, "
          f"p99.9 {p[998] * 1e3:.1f}, longest {max(gaps) * 1e3:.0f}")  # fmt: skip
    print(f"processors used: server {found['server']:.2f}, client {found['client']:.2f}")
    for user, system in found["threads"]:
        print(f"  of the server's, one thread: {user:.2f} and {system:.2f} in the kernel")
    print(f"memory per stream: {found['memory'] / 1024:.0f} KiB")


def wait_for_health(port: int) -> None:
    """Until the worker answers; the socket is open before it has loaded anything."""
    until = time.monotonic() + _OPEN_S
    while time.monotonic() < until:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise SystemExit("the server has not started")


if __name__ == "__main__":
    main()
