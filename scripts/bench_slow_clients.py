#!/usr/bin/env python3
"""Whether a server answers while hundreds of clients are slow, and how soon it notices who left.

    python scripts/bench_slow_clients.py [--clients 500] [--seconds 8] [--idle 10000]

The server is that of ``bench_streams.py``: the real worker, routes and output thread, a paced
engine without a model. For each kind of slow client: so many connections of that kind, and
meanwhile ``GET /health`` twenty times a second, each on a connection of its own. Then streams are
hung up one by one: the time until the engine is told. The clients share the processors.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import contextlib
import json
import multiprocessing
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.sharedctypes import SynchronizedArray
from statistics import median

from bench_streams import PacedEngine, free_port, run_server, wait_for_health

_RATE, _ASKED_PER_S, _LEAVERS = 20.0, 20, 200
_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class WatchedEngine(PacedEngine):
    """Notes when it is told to cancel (``time.perf_counter``, the same clock in all processes)."""

    def __init__(self, cancelled: SynchronizedArray) -> None:
        self._cancelled, self._count = cancelled, 0
        super().__init__(_RATE)

    def cancel(self, request_id: str) -> None:
        if request_id in self._handles and self._count < len(self._cancelled):
            self._cancelled[self._count] = time.perf_counter()
            self._count += 1
        super().cancel(request_id)


def _stream() -> bytes:
    body = json.dumps({"model": "paced", "prompt": [1], "stream": True, "max_tokens": 90_000})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n{body}".encode()


def _start(sent: bytes, answer: bool = False) -> Callable[[int], socket.socket]:
    def connect(port: int) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        sock.sendall(sent)
        if answer:
            sock.recv(4096)
        return sock

    return connect


#: Kind -> what opens a connection of it. None of them is read from or closed afterwards.
KINDS = {
    "nobody": None,
    "silent": _start(b""),
    "half a head": _start(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-"),
    "half a body": _start(_stream()[:-20]),
    "half a large body": _start(_stream().replace(b"Length: ", b"Length: 20000") + b" " * 1000),
    "unread stream": _start(_stream()),
    "never closing": _start(_HEALTH.replace(b"close", b"keep-alive"), answer=True),
}


def ask_health(port: int, seconds: float) -> list[float]:
    """How long each answer took, in seconds; infinite for one that was no success."""
    taken, due = [], time.perf_counter()
    until = due + seconds
    while (due := due + 1 / _ASKED_PER_S) < until:
        time.sleep(max(0.0, due - time.perf_counter()))
        began = time.perf_counter()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                sock.sendall(_HEALTH)
                good = sock.recv(4096).startswith(b"HTTP/1.1 200")
        except OSError:
            good = False
        taken.append(time.perf_counter() - began if good else float("inf"))
    return taken


def measure_kind(port: int, kind: str, clients: int, seconds: float) -> list[float]:
    """``ask_health`` beside so many clients of a kind, all of them open."""
    connect, socks = KINDS[kind], []
    with contextlib.ExitStack() as stack:
        for _ in range(clients if connect is not None else 0):
            socks.append(stack.enter_context(connect(port)))
        return ask_health(port, seconds)


def measure_leaving(port: int, cancelled: SynchronizedArray) -> list[float]:
    """Seconds from a client's hanging up to the engine's being told, of ``_LEAVERS`` streams."""
    connect = _start(_stream(), answer=True)
    socks = [connect(port) for _ in range(_LEAVERS)]
    time.sleep(1)
    before = _cancellations(cancelled)
    left = []
    for sock in socks:
        left.append(time.perf_counter())
        sock.close()
        time.sleep(0.02)
    time.sleep(2)
    told = list(cancelled)[before : _cancellations(cancelled)]
    if len(told) != len(left):
        raise SystemExit(f"{len(left)} have left, the engine was told of {len(told)}")
    return [after - at for at, after in zip(left, told)]


def _cancellations(cancelled: SynchronizedArray) -> int:
    return sum(at > 0 for at in cancelled)


def report(what: str, taken: list[float]) -> None:
    ordered = sorted(taken)
    p99 = ordered[min(len(ordered) - 1, round(0.99 * len(ordered)))]
    print(f"{what:24} {len(taken):5} times, ms: median {median(taken) * 1e3:.1f}, "
          f"p99 {p99 * 1e3:.1f}, longest {ordered[-1] * 1e3:.1f}", flush=True)  # fmt: skip


def main() -> None:
    """Measure every kind and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each kind")
    parser.add_argument("--idle", type=int, default=10_000, help="silent connections at the end")
    parser.add_argument("--only", choices=KINDS, help="one kind")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    port = free_port()
    context = multiprocessing.get_context("fork")
    cancelled = context.Array("d", 20_000, lock=False)
    make_engine = partial(WatchedEngine, cancelled)
    process = context.Process(target=run_server, args=(port, options.clients, make_engine))
    process.start()
    try:
        wait_for_health(port)
        for kind in [options.only] if options.only else KINDS:
            report(kind, measure_kind(port, kind, options.clients, options.seconds))
            time.sleep(2)
        if not options.only:
            report("hung up, engine told", measure_leaving(port, cancelled))
            report(f"{options.idle} silent", measure_kind(port, "silent", options.idle, 8.0))
    finally:
        process.terminate()
        process.join(30)


if __name__ == "__main__":
    main()
