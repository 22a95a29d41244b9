"""The output files of a batch, written from the outcomes of its lines."""

from __future__ import annotations

import heapq
import uuid
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import BinaryIO

import orjson
from sqlalchemy import select
from sqlalchemy.orm import Session

from oxillama_torch.server.batches.lines import Line, read_line
from oxillama_torch.server.batches.records import done_lines, drop_lines, find_batch, move
from oxillama_torch.server.store.files import add_file
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_files import BatchLineRow

__all__ = ["finish", "outputs"]

_NOT_RUN = {
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    "cancelled": ("batch_cancelled", "This request was not executed: the batch was cancelled."),
}


class _Pieces:
    """Bytes of an iterator as a stream to read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)

    def read(self, _size: int = -1) -> bytes:
        return next(self._pieces, b"")


def outputs(session: Session, batch_id: str, *, failed: bool) -> Iterator[tuple[int, bytes]]:
    """(line number, line of output) of the lines that are done, in order."""
    query = (
        select(BatchLineRow.line, BatchLineRow.output)
        .where(BatchLineRow.batch_id == batch_id, BatchLineRow.failed == failed)
        .order_by(BatchLineRow.line)
    )
    yield from session.execute(query.execution_options(yield_per=100))


def finish(
    store: Store, batch_id: str, status: str, content: BinaryIO, lines: list[Line], endpoint: str
) -> None:
    """Write the output files and end the batch; done again from the start when it was cut short.

    Args:
        status: ``completed``, ``expired`` or ``cancelled``.
        content, lines, endpoint: of the input, for the lines that were not run.
    """
    with store.read() as session:
        done = done_lines(session, batch_id)
        left = [line for line in lines if line.number not in done]
        not_run = _not_run(content, left, endpoint, status)
        good = _put(store, outputs(session, batch_id, failed=False))
        bad = _put(
            store,
            heapq.merge(outputs(session, batch_id, failed=True), not_run, key=itemgetter(0)),
        )

    def end(session: Session) -> None:
        row = find_batch(session, batch_id)
        ids = {}
        for name, blob in (("output", good), ("error", bad)):
            if blob is not None:
                file = add_file(
                    session,
                    *blob,
                    filename=f"{batch_id}_{name}.jsonl",
                    purpose="batch_output",
                    lifetime_s=row.options.get("output_lifetime_s"),
                    owner=row.owner,
                )
                ids[f"{name}_file_id"] = file.id
        drop_lines(session, batch_id)
        move(row, status, **ids)

    store.write(end)


def _put(store: Store, numbered: Iterable[tuple[int, bytes]]) -> tuple[str, int] | None:
    """A blob of the lines; None when there are none."""
    blob, nbytes = store.blobs.put(_Pieces(output for _, output in numbered))
    if nbytes:
        return blob, nbytes
    store.blobs.delete(blob)
    return None


def _not_run(
    content: BinaryIO, lines: list[Line], endpoint: str, status: str
) -> Iterator[tuple[int, bytes]]:
    for line in lines:
        custom_id, _ = read_line(content, line, endpoint)
        code, message = _NOT_RUN[status]
        output = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": message},
        }
        yield line.number, orjson.dumps(output) + b"\n"
