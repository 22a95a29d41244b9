"""Runs batches in the background: a thread each, their lines through one pool of threads.

What a line has come to is on the disk before the next step is taken, so that a server that was
killed goes on where it stopped: lines that were acknowledged are not run again, the others are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, BinaryIO

import orjson
from flask import Flask
from sqlalchemy import select

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.batches.lines import Line, Scan, read_line, scan
from oxillama_torch.server.batches.records import (
    UNFINISHED,
    LineResult,
    add_line,
    begin,
    done_lines,
    fail,
    finalize,
    find_batch,
)
from oxillama_torch.server.batches.results import finish
from oxillama_torch.server.internal import Outcome, call
from oxillama_torch.server.store.errors import StoreError
from oxillama_torch.server.store.files import delete_unnamed
from oxillama_torch.server.store.owner import SERVER, act_for, acting_for
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_files import BatchRow

__all__ = ["BatchRunner"]

log = logging.getLogger(__name__)

# Batches that run side by side; the lines of all of them share the pool fairly.
_MOST_ACTIVE = 4
_PAUSE_S = 0.2
_MAX_PAUSE_S = 30.0
# How often a line is given to an engine that answers with an error of its own.
_ATTEMPTS = 4
_STORE_RETRY_S = 1.0


class _Batch:
    """A batch that is being run."""

    def __init__(self, row: BatchRow) -> None:
        self.id, self.blob = row.id, row.blob
        self.endpoint: str = row.data["endpoint"]
        self.expires_at: int = row.data["expires_at"]
        self.caller: dict[str, Any] = row.options.get("caller") or {}
        self.cancelled = threading.Event()
        if row.status == "cancelling":
            self.cancelled.set()

    @property
    def expired(self) -> bool:
        return time.time() >= self.expires_at

    @property
    def over(self) -> bool:
        """Whether no further line is to be run."""
        return self.cancelled.is_set() or self.expired


class BatchRunner:
    """Owner of every unfinished batch.

    Args:
        app: whose routes serve the lines.
        store: where batches stand.
        config: ``batch_lines`` run at once, but no more than a quarter of ``max_streams``.
    """

    def __init__(self, app: Flask, store: Store, config: ServerConfig) -> None:
        self._app, self._store = app, store
        self._lines = max(1, min(config.batch_lines, config.max_streams // 4))
        self._lock = threading.Lock()
        self._waiting: deque[_Batch] = deque()
        self._active: dict[str, threading.Thread] = {}
        self._known: dict[str, _Batch] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._closing = threading.Event()

    # What routes ask for

    def resume(self) -> None:
        """Take up every batch that has not ended: at start."""
        with acting_for(SERVER), self._store.read() as session:
            unfinished = BatchRow.status.in_(UNFINISHED)
            rows = session.scalars(select(BatchRow).where(unfinished).order_by(BatchRow.seq))
            for row in rows.all():
                self.add(row)

    def add(self, row: BatchRow) -> None:
        """Run a batch when its turn comes."""
        with self._lock:
            if row.id in self._known or self._closing.is_set():
                return
            batch = self._known[row.id] = _Batch(row)
            self._waiting.append(batch)
            self._start_some()

    def cancel(self, batch_id: str) -> None:
        """Have a batch end that is ``cancelling``; its lines in progress are finished."""
        with self._lock:
            batch = self._known.get(batch_id)
        if batch is not None:
            batch.cancelled.set()

    def close(self) -> None:
        """Stop; batches go on at the next start."""
        self._closing.set()
        with self._lock:
            threads = list(self._active.values())
        for thread in threads:
            while thread.is_alive():
                # Lines may have begun after the last one: ended until none is left.
                self._app.extensions["lifecycle"].abort()
                thread.join(0.05)
        if self._pool is not None:
            self._pool.shutdown()

    # Running

    def _start_some(self) -> None:
        """Give waiting batches their threads. The lock is held."""
        while self._waiting and len(self._active) < _MOST_ACTIVE:
            batch = self._waiting.popleft()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(
                    self._lines, "batch-line", initializer=act_for, initargs=(SERVER,)
                )
            thread = threading.Thread(
                target=self._run, args=(batch,), name=f"batch {batch.id[-8:]}", daemon=True
            )
            self._active[batch.id] = thread
            thread.start()

    def _run(self, batch: _Batch) -> None:
        act_for(SERVER)
        steps = deque([self._serve, self._let_go])
        try:
            while steps and not self._closing.is_set():
                try:
                    steps[0](batch)
                    steps.popleft()
                except StoreError as error:
                    log.warning("batch %s waits for the store: %s", batch.id, error)
                    self._closing.wait(_STORE_RETRY_S)
                except Exception:
                    log.exception("batch %s failed", batch.id)
                    if steps.popleft() == self._serve:
                        steps.appendleft(self._give_up)
        finally:
            with self._lock:
                del self._active[batch.id], self._known[batch.id]
                if not self._closing.is_set():
                    self._start_some()

    def _serve(self, batch: _Batch) -> None:
        """Take a batch from where it stands to its end."""
        max_bytes = self._app.config["MAX_CONTENT_LENGTH"]
        with self._store.blobs.open(batch.blob) as content:
            found = scan(content, batch.endpoint, max_bytes)
            status = self._store.write(lambda session: begin(session, batch.id, found))
            if status == "in_progress":
                self._run_lines(batch, found, content)
            if not self._closing.is_set() and status != "failed":
                self._end(batch, found, content)

    def _run_lines(self, batch: _Batch, found: Scan, content: BinaryIO) -> None:
        with self._store.read() as session:
            done = done_lines(session, batch.id)
        running: set[Future] = set()
        try:
            for line in found.lines:
                if line.number in done:
                    continue
                if len(running) >= self._lines:
                    running -= _finished(running)
                if batch.over or self._closing.is_set():
                    break
                custom_id, body = read_line(content, line, batch.endpoint)
                work = (batch, line, custom_id, orjson.dumps(body))
                running.add(self._pool.submit(self._run_line, *work))
        finally:
            wait(running)
        for future in running:
            future.result()

    def _end(self, batch: _Batch, found: Scan, content: BinaryIO) -> None:
        """Everything that will be run has been run."""
        with self._store.read() as session:
            missing = len(found.lines) - len(done_lines(session, batch.id))
        status = self._store.write(lambda session: finalize(session, batch.id, missing))
        finish(self._store, batch.id, status, content, found.lines, batch.endpoint)

    def _give_up(self, batch: _Batch) -> None:
        """End a batch that has met a fault of ours."""
        error = {
            "code": "server_error",
            "line": None,
            "message": "The server failed while it ran this batch.",
            "param": None,
        }
        self._store.write(lambda session: fail(find_batch(session, batch.id), [error]))

    def _let_go(self, batch: _Batch) -> None:
        """The batch needs its input no more; it may have been deleted meanwhile."""
        delete_unnamed(self._store, batch.blob)

    # One line, on a thread of the pool

    def _run_line(self, batch: _Batch, line: Line, custom_id: str, body: bytes) -> None:
        attempts = 0
        while not batch.over and not self._closing.is_set():
            if self._app.extensions["lifecycle"].draining:
                self._closing.wait(_PAUSE_S)
                continue
            outcome = call(self._app, batch.endpoint, body, batch.caller)
            if self._closing.is_set() and outcome.status >= 500:
                return  # cut short: it is run again after the next start
            attempts += self._counts(outcome)
            if not _is_passing(outcome) or attempts >= _ATTEMPTS:
                self._keep(batch, line, LineResult.of(custom_id, outcome))
                return
            until = time.monotonic() + min(outcome.retry_after_s * 2**attempts, _MAX_PAUSE_S)
            while time.monotonic() < until and not (batch.over or self._closing.wait(_PAUSE_S)):
                pass

    def _counts(self, outcome: Outcome) -> bool:
        """Whether an attempt has met an engine at work; waiting for one to come back is free."""
        alive = self._app.extensions["service"].engine.alive
        return outcome.status == 503 and alive and b'"engine_error"' in outcome.body

    def _keep(self, batch: _Batch, line: Line, result: LineResult) -> None:
        """Acknowledge a line. While the store cannot, the line is not done."""
        while True:
            try:
                self._store.write(lambda session: add_line(session, batch.id, line.number, result))
                return
            except StoreError as error:
                log.warning("a line of batch %s waits for the store: %s", batch.id, error)
                if self._closing.wait(_STORE_RETRY_S):
                    return


def _finished(running: set[Future]) -> set[Future]:
    """Wait for lines to end; raises what one has raised."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return done


def _is_passing(outcome: Outcome) -> bool:
    """Whether the same request may succeed later."""
    return outcome.status in (429, 503)
