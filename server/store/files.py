"""Files: a row and a blob each, which come and go together."""

from __future__ import annotations

import contextlib
import time
import uuid

from sqlalchemy import Column, select
from sqlalchemy.orm import Session

from oxillama_torch.errors import RequestError
from oxillama_torch.server.store.owner import SERVER, acting_for
from oxillama_torch.server.store.paging import fetch
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import Base
from oxillama_torch.server.store.tables_files import FileRow

__all__ = ["add_file", "delete_file", "delete_unnamed", "expire_files", "find_file", "sweep_blobs"]


def add_file(
    session: Session,
    blob: str,
    nbytes: int,
    *,
    filename: str,
    purpose: str,
    lifetime_s: int | None = None,
    **columns: str | None,
) -> FileRow:
    """Write the row of a file whose blob is there; ``columns``: its owner, if not the session's."""
    now = int(time.time())
    expires_at = None if lifetime_s is None else now + lifetime_s
    data = {
        "id": f"file-{uuid.uuid4().hex}",
        "object": "file",
        "bytes": nbytes,
        "created_at": now,
        "expires_at": expires_at,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }
    row = FileRow(
        id=data["id"],
        created_at=now,
        data=data,
        blob=blob,
        purpose=purpose,
        expires_at=expires_at,
        **columns,
    )
    session.add(row)
    return row


def find_file(session: Session, file_id: str) -> FileRow:
    """The row of a file.

    Raises:
        RequestError: 404.
    """
    return fetch(session, FileRow, file_id, "file")


def delete_file(store: Store, file_id: str) -> None:
    """Delete a file; its blob stays as long as something else names it.

    Raises:
        RequestError: 404.
    """

    def delete(session: Session) -> str:
        row = find_file(session, file_id)
        session.delete(row)
        return row.blob

    delete_unnamed(store, store.write(delete))


def delete_unnamed(store: Store, blob: str) -> None:
    """Delete a blob, unless something names it, whoever that belongs to."""
    with acting_for(SERVER), store.read() as session:
        if _named(session, blob):
            return
    store.blobs.delete(blob)


def expire_files(store: Store) -> None:
    """Delete the files whose time has come, whoever they belong to."""
    with acting_for(SERVER):
        with store.read() as session:
            late = FileRow.expires_at <= int(time.time())
            ids = session.scalars(select(FileRow.id).where(late)).all()
        for file_id in ids:
            with contextlib.suppress(RequestError):  # somebody was faster
                delete_file(store, file_id)


def sweep_blobs(store: Store) -> None:
    """Delete blobs that nothing names: their rows were never written. Only while nobody uploads."""
    with acting_for(SERVER), store.read() as session:
        named = {blob for column in _columns() for blob in session.scalars(select(column))}
    for blob in set(store.blobs.ids()) - named:
        store.blobs.delete(blob)


def _named(session: Session, blob: str) -> bool:
    queries = (select(column).where(column == blob).limit(1) for column in _columns())
    return any(session.scalar(query) is not None for query in queries)


def _columns() -> list[Column]:
    """Where blobs are named."""
    return [table.c.blob for table in Base.metadata.tables.values() if "blob" in table.c]
