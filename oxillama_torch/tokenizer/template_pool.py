"""The parent's side of ``template_worker.py``: a few processes, asked by many threads."""

from __future__ import annotations

import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oxillama_torch.errors import CapacityError

__all__ = ["TemplateLimits", "TemplatePool"]

_COMMAND = (sys.executable, "-s", "-m", "oxillama_torch.tokenizer.template_worker")
_ROOT = str(Path(__file__).resolve().parents[2])  # where the worker finds this package
_GRACE_S = 5.0  # wall time for starting, and for a busy machine, before a process is killed


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may use.

    Args:
        seconds: processor time, compiling included: a busy machine ends no innocent rendering.
        memory: address space of the worker process, bytes.
        output: characters.
    """

    seconds: float = 1.0
    memory: int = 512 << 20
    output: int = 8 << 20


class TemplatePool:
    """Render templates in worker processes; safe to use from many threads.

    A process starts when it is first needed. One that dies or is killed is replaced at once, and
    nothing but the request it died of is lost.

    Args:
        sources: Jinja source by name.
        limits: what one rendering may use.
        workers: processes at most.
        queue_s: how long a request waits for a free process.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        limits: TemplateLimits,
        *,
        workers: int = 2,
        queue_s: float = 10.0,
    ) -> None:
        self._setup = {"sources": dict(sources), **asdict(limits)}
        self._count, self._queue_s = workers, queue_s
        self._open()

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
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
            raise CapacityError("all chat-template workers are busy") from None
        try:
            with worker.lock:
                if self._closed.is_set():
                    raise CapacityError("the chat template has been closed")
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
        workers = [_Worker(self._setup) for _ in range(self._count)]
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

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.lock = threading.Lock()
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Exchange one request for one answer; a dead process is replaced."""
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._start()
        line = self._exchange(_line(request), self._setup["seconds"] + _GRACE_S)
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
            _COMMAND,
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
