"""Processes for what may run wild: asked by many threads, confined by the kernel.

A worker is a module that is run as a program. It reads one JSON object per line, the first being
its setup, and answers each other one with a line; see ``tokenizer.template_worker``.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oxillama_torch.errors import CapacityError

__all__ = ["WorkerPool", "confine"]

_ROOT = str(Path(__file__).resolve().parents[1])  # where a worker finds this package
# Wall time for starting, and for a busy machine, before a process is killed. Hostile requests are
# ended before that, by their processor time.
_GRACE_S = 30.0


def confine(memory: int) -> None:
    """Give up what a worker does not need: memory beyond a limit, files, processes, threads.

    Args:
        memory: address space of this process, bytes.
    """
    for what, amount in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(what, (amount, amount))


class WorkerPool:
    """Answers of worker processes; safe to use from many threads.

    A process starts when it is first needed. One that dies or is killed is replaced at once, and
    nothing but the request it died of is lost.

    Args:
        module: the worker's, by its full name.
        setup: the first thing each worker reads.
        seconds: processor time that it allows itself for one request.
        what: what errors call a worker.
        workers: processes at most.
        queue_s: how long a request waits for a free process.
    """

    def __init__(
        self,
        module: str,
        setup: Mapping[str, Any],
        *,
        seconds: float,
        what: str,
        workers: int = 2,
        queue_s: float = 10.0,
    ) -> None:
        self._module, self._setup, self._seconds = module, dict(setup), seconds
        self._what, self._count, self._queue_s = what, workers, queue_s
        self._open()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request to a worker and return its answer.

        An answer of ``{"error": "time"}`` or ``{"error": "memory"}`` means the process is gone.

        Raises:
            CapacityError: all workers stayed busy, or the pool is closed.
        """
        if self._pid != os.getpid():
            self._open()  # forked: the processes are the parent's
        try:
            worker = self._idle.get(timeout=self._queue_s)
        except queue.Empty:
            raise CapacityError(f"all {self._what} workers are busy") from None
        try:
            with worker.lock:
                if self._closed.is_set():
                    raise CapacityError(f"the {self._what} workers have been closed")
                return worker.ask(request)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Let requests under way finish and end the processes.

        Runs by itself when the pool is collected or Python exits.
        """
        self._finalizer()

    def _open(self) -> None:
        self._pid = os.getpid()
        self._closed = threading.Event()
        workers = [_Worker(self._module, self._setup, self._seconds) for _ in range(self._count)]
        # Last in, first out: the second process starts only when two requests meet.
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in workers:
            self._idle.put(worker)
        self._finalizer = weakref.finalize(self, _close_all, workers, self._closed, self._pid)


def _close_all(workers: list[_Worker], closed: threading.Event, pid: int) -> None:
    if pid != os.getpid():
        return  # forked: these are the parent's
    closed.set()
    for worker in workers:
        with worker.lock:
            worker.stop()


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self, module: str, setup: Mapping[str, Any], seconds: float) -> None:
        self.lock = threading.Lock()
        self._command = (sys.executable, "-s", "-m", module)
        self._setup, self._seconds = setup, seconds
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Exchange one request for one answer; a dead process is replaced."""
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._start()
        line = self._exchange(_line(request), self._seconds + _GRACE_S)
        answer = {} if line is None else json.loads(line)
        if line is not None and answer.get("error") != "memory":
            return answer
        status = self.stop()
        self._start()
        # Killed by its timer, or by stop() for want of an answer; else the memory ran out.
        out_of_time = line is None and status in (-signal.SIGPROF, -signal.SIGKILL)
        return {"error": "time" if out_of_time else "memory"}

    def stop(self) -> int | None:
        """End the process and wait for it; return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.stdin.close()
        process.stdout.close()
        process.kill()
        return process.wait()

    def _start(self) -> None:
        # Nothing of ours is inherited: no sockets or files, no environment with keys in it.
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            close_fds=True,
            start_new_session=True,  # Ctrl-C in a terminal is for us
            env={"PYTHONPATH": os.pathsep.join([_ROOT, *filter(None, sys.path)])},
        )
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        self._process, self._unsent = process, _line(self._setup)

    def _exchange(self, data: bytes, seconds: float) -> bytes | None:
        """Write ``data``, read one line. None: the process died or did not answer in time."""
        process, deadline = self._process, time.monotonic() + seconds
        rest, self._unsent = memoryview(self._unsent + data), b""
        received: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    try:
                        if key.fileobj is process.stdin:
                            rest = rest[os.write(key.fd, rest) :]
                            if not rest:
                                selector.unregister(process.stdin)
                            continue
                        chunk = os.read(key.fd, 1 << 16)
                    except BrokenPipeError:
                        return None
                    received.append(chunk)
                    if not chunk or chunk.endswith(b"\n"):
                        return b"".join(received) if chunk else None
        return None


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
