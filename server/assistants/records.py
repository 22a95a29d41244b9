"""The rows of assistants, threads and runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, TypeVar

import orjson
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from oxillama_torch.errors import RequestError
from oxillama_torch.server.assistants.builder import RunBuilder
from oxillama_torch.server.assistants.objects import Object, new_message
from oxillama_torch.server.schemas.assistants import MessageBody, MetadataBody
from oxillama_torch.server.store.paging import fetch
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import Row
from oxillama_torch.server.store.tables_assistants import MessageRow, RunRow, StepRow, ThreadRow

__all__ = [
    "ACTIVE",
    "NO_TOKENS",
    "add",
    "add_run",
    "cancel_run",
    "change_metadata",
    "delete_thread",
    "end_run",
    "expire_runs",
    "find_run",
    "find_thread",
    "history",
    "new_messages",
    "recover_runs",
    "require_idle",
    "save",
    "write_messages",
]

ACTIVE = ("queued", "in_progress", "requires_action", "cancelling")
NO_TOKENS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}

R = TypeVar("R", bound=Row)


def add(session: Session, table: type[R], data: Object, **columns: Any) -> R:
    """Write the row of a new object."""
    row = table(id=data["id"], created_at=data["created_at"], data=data, **columns)
    session.add(row)
    return row


def new_messages(thread_id: str, bodies: Iterable[MessageBody]) -> list[Object]:
    """The messages of bodies."""
    return [
        new_message(thread_id, body.role, body.texts(), metadata=body.metadata) for body in bodies
    ]


def write_messages(session: Session, messages: Iterable[Object]) -> None:
    """Add messages at their thread's end."""
    for message in messages:
        ids = {"thread_id": message["thread_id"], "run_id": message["run_id"]}
        add(session, MessageRow, message, **ids)
        session.flush()  # they are numbered in this order


def change_metadata(row: Row, body: MetadataBody) -> Object:
    """Replace the metadata of an object, where the body has some."""
    if body.metadata is not None:
        row.data = {**row.data, "metadata": body.metadata}
    return row.data


def add_run(session: Session, run: Object) -> RunRow:
    """Write a new run."""
    return add(
        session,
        RunRow,
        run,
        thread_id=run["thread_id"],
        status=run["status"],
        expires_at=run["expires_at"],
        usage=dict(NO_TOKENS),
    )


def find_thread(session: Session, thread_id: str) -> ThreadRow:
    """The row of a thread.

    Raises:
        RequestError: 404.
    """
    return fetch(session, ThreadRow, thread_id, "thread")


def find_run(session: Session, thread_id: str, run_id: str) -> RunRow:
    """The row of a thread's run.

    Raises:
        RequestError: 404.
    """
    find_thread(session, thread_id)
    return fetch(session, RunRow, run_id, "run", thread_id=thread_id)


def delete_thread(session: Session, thread_id: str) -> None:
    """Delete a thread with all that belongs to it.

    Raises:
        RequestError: 404.
    """
    session.delete(find_thread(session, thread_id))
    for table in (MessageRow, RunRow, StepRow):
        session.execute(delete(table).where(table.thread_id == thread_id))


def require_idle(session: Session, thread_id: str, what: str) -> None:
    """Refuse what cannot be done while a run works on the thread.

    Raises:
        RequestError: 400; 404 when there is no such thread.
    """
    find_thread(session, thread_id)
    query = select(RunRow.id).where(RunRow.thread_id == thread_id, RunRow.status.in_(ACTIVE))
    run_id = session.scalar(query.limit(1))
    if run_id is not None:
        raise RequestError(f"{what} {thread_id} while a run {run_id} is active.")


def save(session: Session, objects: Iterable[Object], usage: dict[str, int]) -> None:
    """Write what a run has changed; nothing, when its thread has been deleted meanwhile."""
    for data in objects:
        kind = data["object"]
        table = {"thread.run": RunRow, "thread.run.step": StepRow}.get(kind, MessageRow)
        run = session.get(RunRow, data["id"] if table is RunRow else data["run_id"])
        if run is None:
            return
        if table is RunRow:
            run.data, run.status, run.usage = data, data["status"], usage
        elif (row := session.get(table, data["id"])) is not None:
            row.data = data
        else:
            add(session, table, data, thread_id=run.thread_id, run_id=run.id)
            session.flush()


def cancel_run(session: Session, thread_id: str, run_id: str) -> RunRow:
    """Ask for the end of a run.

    Raises:
        RequestError: 404; 400 when it has ended.
    """
    row = find_run(session, thread_id, run_id)
    if row.status not in ACTIVE:
        raise RequestError(f"Cannot cancel run with status '{row.status}'.")
    row.status = "cancelling"
    row.data = {**row.data, "status": "cancelling"}
    return row


def end_run(session: Session, run_id: str, status: str, error: Object | None = None) -> None:
    """End a run that nothing works on."""
    row = session.get(RunRow, run_id)
    if row is None or row.status not in ACTIVE:
        return
    builder = RunBuilder(_copy(row.data), dict(row.usage))
    for table in (StepRow, MessageRow):
        for other in session.scalars(select(table).where(table.run_id == run_id)):
            if other.data["status"] == "in_progress":
                setattr(builder, "step" if table is StepRow else "message", _copy(other.data))
    for _ in builder.end(status, error):
        pass
    save(session, builder.changed, builder.usage)


def expire_runs(store: Store) -> None:
    """End the runs whose tool outputs have not come in time."""
    with store.read() as session:
        late = RunRow.expires_at <= int(time.time())
        query = select(RunRow.id).where(RunRow.status == "requires_action", late)
        ids = session.scalars(query).all()
    for run_id in ids:
        store.write(lambda session, run_id=run_id: end_run(session, run_id, "expired"))


def recover_runs(store: Store) -> None:
    """End what a crash has cut; runs that wait for their client go on waiting."""
    error = {"code": "server_error", "message": "The server was restarted during this run."}
    with store.read() as session:
        cut = RunRow.status.in_(("queued", "in_progress", "cancelling"))
        rows = session.execute(select(RunRow.id, RunRow.status).where(cut)).all()
    for run_id, status in rows:
        end = ("cancelled", None) if status == "cancelling" else ("failed", error)
        store.write(lambda session, run_id=run_id, end=end: end_run(session, run_id, *end))


def history(session: Session, thread_id: str) -> list[Object]:
    """Messages and steps with tool calls of a thread, in the order in which they came to be."""
    rows: list[MessageRow | StepRow] = []
    for table in (MessageRow, StepRow):
        rows += session.scalars(select(table).where(table.thread_id == thread_id))
    rows.sort(key=lambda row: row.seq)
    return [row.data for row in rows if row.data.get("type") != "message_creation"]


def _copy(data: Object) -> Object:
    return orjson.loads(orjson.dumps(data))
