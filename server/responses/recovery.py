"""Background responses that the end of the process has cut: begun again, or marked as failed."""

from __future__ import annotations

import logging
import threading
import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from oxillama_torch.errors import CapacityError, EngineError, OxiLlamaError, RequestError
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.create import draft, launch
from oxillama_torch.server.responses.runner import ResponseRunner
from oxillama_torch.server.schemas.responses import ResponseBody
from oxillama_torch.server.store.errors import StoreError
from oxillama_torch.server.store.owner import SERVER, act_for, acting_for
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ResponseRow

__all__ = ["UNFINISHED", "Recovery"]

log = logging.getLogger(__name__)

UNFINISHED = ("queued", "in_progress")

# A response that the process did not survive so often may be the reason why.
_MOST_ATTEMPTS = 3
_PATIENCE_S = 600.0
_PAUSE_S = 0.2
_STORE_RETRY_S = 1.0


class Recovery:
    """Takes up what was in progress, in its own thread: there may be more than fits at once."""

    def __init__(self, services: Services, store: Store, runner: ResponseRunner) -> None:
        self._services, self._store, self._runner = services, store, runner
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look for unfinished responses."""
        with acting_for(SERVER), self._store.read() as session:
            query = select(ResponseRow.id).where(ResponseRow.status.in_(UNFINISHED))
            ids = list(session.scalars(query.order_by(ResponseRow.seq)))
        if ids:
            self._thread = threading.Thread(
                target=self._resume_all, args=(ids,), name="recovery", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Leave what has not been taken up to the next start."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _resume_all(self, ids: list[str]) -> None:
        act_for(SERVER)
        for response_id in ids:
            while not self._closing.is_set():
                try:
                    self._resume(response_id)
                    break
                except StoreError as error:
                    log.warning("response %s waits for the store: %s", response_id, error)
                    self._closing.wait(_STORE_RETRY_S)

    def _resume(self, response_id: str) -> None:
        row = self._store.write(lambda session: _claim(session, response_id))
        deadline = time.monotonic() + _PATIENCE_S
        error: OxiLlamaError = EngineError("the server stopped while it worked on this response")
        while row is not None and row.attempts <= _MOST_ATTEMPTS and not self._closing.is_set():
            try:
                self._launch(row)
                return
            except OxiLlamaError as problem:
                error = problem
                later = isinstance(problem, CapacityError) or (
                    isinstance(problem, RequestError) and problem.status == 503
                )
                if not later or time.monotonic() > deadline:
                    break
                self._closing.wait(_PAUSE_S)
            except Exception:
                log.exception("response %s cannot be taken up", response_id)
                break
        if row is not None and not self._closing.is_set():
            self._store.write(lambda session: _give_up(session, response_id, error))

    def _launch(self, row: ResponseRow) -> None:
        body = ResponseBody.parse(row.request)
        with self._services.lease(body.model) as found, acting_for(row.owner):
            made = draft(body, found, self._store)
            made.items = row.input
            made.response |= {"id": row.id, "created_at": row.created_at}
            job = launch(made, self._store, streamed=False)
        self._runner.start(job)


def _claim(session: Session, response_id: str) -> ResponseRow | None:
    """Count the attempt before it is made."""
    row = session.get(ResponseRow, response_id)
    if row is None or row.status not in UNFINISHED:
        return None
    row.attempts += 1
    return row


def _give_up(session: Session, response_id: str, error: OxiLlamaError) -> None:
    row = session.get(ResponseRow, response_id)
    if row is not None and row.status in UNFINISHED:
        row.status = "failed"
        problem = {"code": "server_error", "message": str(error)}
        row.data = {**row.data, "status": "failed", "error": problem}
