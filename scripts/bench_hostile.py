#!/usr/bin/env python3
"""How long a stream waits while others send what is made to hold the server up.

    python scripts/bench_hostile.py [--limit 150] [--only grammar] [--repeat 3]

Serves the demo model (or ``--model``). One client, a process of its own, keeps an answer streaming;
beside it each kind of request in ``hostile_requests.py`` is sent a few times, one by one. Printed
for each: the statuses, how long its answer took, and the longest gap between two pieces of the
stream meanwhile.
Exit status 1 where a gap is longer than the limit, an answer is a 5xx or none, or the stream broke.
The clients share the processors with the server: a gap counts that too.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from hostile_requests import MODEL, Hostile, hostile_requests
from rich.console import Console
from rich.table import Table

from oxillama_torch.config import demo_model_path

_START_S, _ANSWER_S = 120, 60
_QUIET_S = 0.3  # before each request and after the last one, so that what is late is seen too


@contextmanager
def served(model: Path) -> Iterator[int]:
    """A server of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", str(port)]
    environment = {**os.environ, "OXILLAMA_MODEL_ALIAS": MODEL}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [*command, "-m", str(model)], stdout=log, stderr=log, env=environment
        )
        try:
            if not _answers(port, server):
                log.seek(0)
                raise SystemExit(f"the server did not start:\n{log.read()}")
            yield port
        finally:
            server.terminate()
            server.wait(30)


def _answers(port: int, server: subprocess.Popen) -> bool:
    """Wait until it is up; whether it is."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            if send(port, "GET", "/health", b"", "")[0] == 200:
                return True
        except OSError:
            time.sleep(0.2)
    return False


def send(port: int, method: str, path: str, body: bytes, content_type: str) -> tuple[int, bytes]:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_S)
    try:
        connection.request(method, path, body or None, {"Content-Type": content_type})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Bystander:
    """One stream after the other; ``gaps`` between the pieces of each. Runs in its own process."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._gaps: list[tuple[float, float]] = []
        self._last: float | None = None
        self.broken: str | None = None

    def read_on(self) -> None:
        body = {"model": MODEL, "prompt": "import", "max_tokens": 400, "ignore_eos": True}
        payload = json.dumps({**body, "stream": True, "seed": 1}).encode()
        while self.broken is None:
            try:
                self._read(payload)
            except Exception as error:
                self.broken = f"{type(error).__name__}: {error}"

    def _read(self, body: bytes) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_S)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"status {answer.status}: {answer.read(300)!r}")
        self._last = None
        for line in answer:
            if b'"error"' in line:
                raise RuntimeError(line.decode())
            if line.startswith(b"data: {"):
                now = time.monotonic()
                if self._last is not None:
                    self._gaps.append((now, now - self._last))
                self._last = now
            elif line.startswith(b"data: [DONE]"):
                self._last = None
        connection.close()

    def longest(self, since: float) -> float:
        """Of the gaps that ended after ``since``, and of the one that goes on."""
        now, last = time.monotonic(), self._last
        gaps = [gap for end, gap in self._gaps if end > since]
        self._gaps.clear()
        return max([*gaps, now - last if last is not None else 0.0])


def bystand(port: int, pipe: Connection) -> None:
    """The process: answers each time that comes through the pipe with the longest gap since."""
    bystander = Bystander(port)
    threading.Thread(target=bystander.read_on, daemon=True).start()
    while (since := pipe.recv()) is not None:
        pipe.send((bystander.longest(since), bystander.broken))


def measure(port: int, pipe: Connection, hostile: Hostile | None, repeat: int) -> dict:
    """Send a request some times; without one, look at the stream alone."""
    started = time.monotonic()
    statuses, seconds = [], []
    for _ in range(repeat if hostile is not None else 0):
        time.sleep(_QUIET_S)
        began = time.monotonic()
        try:
            statuses.append(send(port, "POST", hostile.path, hostile.body, hostile.content_type)[0])
        except (OSError, http.client.HTTPException) as error:
            statuses.append(type(error).__name__)
        seconds.append(time.monotonic() - began)
    time.sleep(_QUIET_S)
    pipe.send(started)
    gap, broken = pipe.recv()
    return {
        "kind": hostile.kind if hostile is not None else "nothing",
        "statuses": sorted(set(map(str, statuses))),
        "seconds": median(seconds) if seconds else None,
        "gap_ms": 1e3 * gap,
        "broken": broken,
    }


def problem(row: dict, limit_ms: float) -> str:
    """What is wrong with a row, or nothing."""
    if row["broken"]:
        return f"the stream broke: {row['broken']}"
    if any(not status.isdigit() or status >= "500" for status in row["statuses"]):
        return "no sound answer"
    return "too long" if row["gap_ms"] > limit_ms else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="GGUF file")
    parser.add_argument("--limit", type=float, default=150, help="longest gap, ms")
    parser.add_argument("--repeat", type=int, default=3, help="times that each kind is sent")
    parser.add_argument("--only", default="", help="kinds with this in their names")
    parser.add_argument("--json", type=Path, help="keep the figures")
    options = parser.parse_args()
    table = Table("what is sent", "status", "s", "longest gap ms", "")
    rows = []
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with served(options.model) as port:
        client = multiprocessing.get_context("spawn").Process(target=bystand, args=(port, theirs))
        client.start()
        time.sleep(2)
        ours.send(0.0), ours.recv()
        kinds = [kind for kind in hostile_requests() if options.only in kind.kind]
        for hostile in [None, *kinds]:
            row = measure(port, ours, hostile, options.repeat)
            rows.append(row)
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.3f}"
            wrong = problem(row, options.limit)
            table.add_row(
                row["kind"], ", ".join(row["statuses"]), seconds, f"{row['gap_ms']:.0f}", wrong
            )
            if row["broken"]:
                break
        ours.send(None)
        client.join()
    Console(width=120).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(problem(row, options.limit) for row in rows))


if __name__ == "__main__":
    main()
