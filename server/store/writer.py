"""The one thread that writes: transactions are grouped, so that many share one commit.

SQLite has one writer at a time anyway, and threads that compete for it mostly meet its lock.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from oxillama_torch.server.store.database import reason_of
from oxillama_torch.server.store.errors import StoreError
from oxillama_torch.server.store.owner import Owner, restrict

__all__ = ["PATIENCE_S", "Writer"]

log = logging.getLogger(__name__)

# How long a write may meet a locked or restarting database before it fails.
PATIENCE_S = 5.0
_GROUP = 256
# The database has failed, rather than what was asked of it.
_TROUBLE = (OperationalError, InternalError, InterfaceError, PoolTimeout)
_PAUSE_S = 0.02


class _CommitFailed(Exception):  # noqa: N818 (only passed on)
    """The commit itself failed: whether it happened is not known."""


@dataclass(slots=True)
class _Job:
    function: Callable[[Session], Any]
    owner: Owner
    future: Future = field(default_factory=Future)
    deadline: float = field(default_factory=lambda: time.monotonic() + PATIENCE_S)


class Writer:
    """Runs functions in transactions, one after the other; its thread starts on first use.

    Args:
        engine: connects to the database; used by this thread only.
        last_seq: the highest ``seq`` of any row.
    """

    def __init__(self, engine: Engine, last_seq: int) -> None:
        self._engine = engine
        self._seq = last_seq
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.failed: str | None = None

    def submit(self, function: Callable[[Session], Any], owner: Owner = None) -> Future:
        """Have ``function`` run; its future is done when its changes are on the disk.

        Its session finds the rows of ``owner``. It may be run again, when the database or another
        function of its group fails: so it must change nothing but rows. What it raises is raised
        by the future, and undoes its changes alone.
        """
        job = _Job(function, owner)
        with self._lock:
            if self._closed or self.failed:
                job.future.set_exception(StoreError(self.failed or "it is closed"))
                return job.future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="store", daemon=True)
                self._thread.start()
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Write what waits, then stop."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None:
            self._jobs.put(None)
            thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            group = [self._jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(group) < _GROUP and group[-1] is not None:
                    group.append(self._jobs.get_nowait())
            closing = group[-1] is None
            jobs = [job for job in group if job is not None]
            if jobs and not self._together(jobs):
                for job in jobs:
                    self._alone(job)

    def _together(self, jobs: list[_Job]) -> bool:
        """One transaction for all; False when it failed and nothing of it is on the disk."""
        try:
            results = self._transaction(jobs)
        except _CommitFailed as error:
            self._commit_failed(jobs, error)
            return True
        except Exception as error:
            # One of them may be to blame; alone, each fails for itself.
            log.debug("a group of %d writes is split: %r", len(jobs), error)
            return False
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
        return True

    def _alone(self, job: _Job) -> None:
        """One job, tried again while the database is locked or away."""
        while True:
            try:
                job.future.set_result(self._transaction([job])[0])
                return
            except _CommitFailed as error:
                self._commit_failed([job], error)
                return
            except _TROUBLE as error:
                reason = self.failed or reason_of(error)
                if "disk" in reason or self.failed or time.monotonic() > job.deadline:
                    log.error("the store cannot write: %s", reason)
                    job.future.set_exception(StoreError(reason))
                    return
                time.sleep(_PAUSE_S * (0.5 + random.random()))
            except Exception as error:
                job.future.set_exception(error)
                return

    def _commit_failed(self, jobs: list[_Job], error: _CommitFailed) -> None:
        reason = reason_of(error)
        if "reports an error" in reason:
            # After a failed fsync a later success says nothing about what was lost.
            self.failed = f"{reason}; it needs a restart"
        log.error("the store cannot commit: %s", reason)
        for job in jobs:
            job.future.set_exception(StoreError(reason))

    def _transaction(self, jobs: list[_Job]) -> list[Any]:
        if self.failed:
            raise StoreError(self.failed)  # also for what was waiting when it failed
        with Session(self._engine, expire_on_commit=False) as session:
            event.listen(session, "before_flush", self._number)
            results = []
            for job in jobs:
                restrict(session, job.owner)
                results.append(job.function(session))
            session.flush()
            try:
                session.commit()
            except Exception as error:
                raise _CommitFailed from error
        return results

    def _number(self, session: Session, *_: object) -> None:
        for row in session.new:
            if row.seq is None:
                self._seq += 1
                row.seq = self._seq
