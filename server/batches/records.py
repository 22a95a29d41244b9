"""The rows of batches: every step of a batch's life is one transaction here."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from oxillama_torch.errors import RequestError
from oxillama_torch.server.batches.lines import Scan
from oxillama_torch.server.internal import Outcome
from oxillama_torch.server.store.paging import fetch
from oxillama_torch.server.store.tables_files import BatchLineRow, BatchRow

__all__ = [
    "UNFINISHED",
    "LineResult",
    "add_batch",
    "add_line",
    "begin",
    "cancel",
    "done_lines",
    "drop_lines",
    "fail",
    "finalize",
    "find_batch",
    "move",
]

_STAMPS = ("cancelled", "cancelling", "completed", "expired", "failed", "finalizing")
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


def add_batch(
    session: Session,
    *,
    endpoint: str,
    input_file_id: str,
    blob: str,
    window: tuple[str, int],
    metadata: dict[str, str] | None,
    options: dict[str, Any],
) -> BatchRow:
    """A new batch, ``validating``.

    Args:
        blob: content of the input file.
        window: as the client wrote it, and in seconds.
    """
    now = int(time.time())
    data = {
        "id": f"batch_{uuid.uuid4().hex}",
        "object": "batch",
        "endpoint": endpoint,
        "model": None,
        "errors": None,
        "input_file_id": input_file_id,
        "completion_window": window[0],
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "in_progress_at": None,
        "expires_at": now + window[1],
        **{f"{name}_at": None for name in _STAMPS},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": _usage({}),
        "metadata": metadata,
    }
    row = BatchRow(id=data["id"], created_at=now, data=data, blob=blob, options=options)
    row.status = data["status"]
    session.add(row)
    return row


def find_batch(session: Session, batch_id: str) -> BatchRow:
    """The row of a batch.

    Raises:
        RequestError: 404.
    """
    return fetch(session, BatchRow, batch_id, "batch")


def move(row: BatchRow, status: str, **changes: Any) -> None:
    """Give a batch another status, with the time of it."""
    row.status = status
    if status not in UNFINISHED:
        row.blob = ""  # the input may go now, if its file has gone
    row.data = {**row.data, "status": status, f"{status}_at": int(time.time()), **changes}


def begin(session: Session, batch_id: str, scan: Scan) -> str:
    """The input has been checked: the batch runs, or has failed. Returns: its status."""
    row = find_batch(session, batch_id)
    if row.status != "validating":
        return row.status
    counts = {"total": len(scan.lines), "completed": 0, "failed": 0}
    if scan.errors:
        fail(row, scan.errors)
    else:
        move(row, "in_progress", request_counts=counts, model=scan.model)
    return row.status


def fail(row: BatchRow, errors: list[dict[str, Any]]) -> None:
    """End a batch that cannot be run."""
    move(row, "failed", errors={"object": "list", "data": errors})


def finalize(session: Session, batch_id: str, missing: int) -> str:
    """Nothing more is run. Returns: the status that the batch ends with.

    Args:
        missing: lines that were not run.
    """
    row = find_batch(session, batch_id)
    if row.status == "cancelling":
        return "cancelled"
    if row.status == "in_progress":
        move(row, "finalizing")
    return "expired" if missing else "completed"


def cancel(session: Session, batch_id: str) -> BatchRow:
    """Ask for the end of a batch; asking twice is no error.

    Raises:
        RequestError: 404; 400 when it has ended or is about to.
    """
    row = find_batch(session, batch_id)
    if row.status in ("validating", "in_progress"):
        move(row, "cancelling")
    elif row.status not in ("cancelling", "cancelled"):
        raise RequestError(
            f"A batch with status '{row.status}' cannot be cancelled.", code="invalid_batch_status"
        )
    return row


@dataclass(frozen=True, slots=True)
class LineResult:
    """What a line has come to.

    Args:
        output: its line of the output file.
        usage: as batches have it.
    """

    failed: bool
    output: bytes
    usage: dict[str, Any]

    @classmethod
    def of(cls, custom_id: str, outcome: Outcome) -> LineResult:
        """The result of a request. Not in a transaction: a large answer would hold up the store."""
        body = orjson.loads(outcome.body)
        output = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": {
                "status_code": outcome.status,
                "request_id": outcome.request_id,
                "body": body,
            },
            "error": None,
        }
        line = orjson.dumps(output) + b"\n"
        return cls(outcome.status != 200, line, _usage(body.get("usage") or {}))


def add_line(session: Session, batch_id: str, number: int, result: LineResult) -> None:
    """Keep what a line has come to, and count it."""
    values = {"failed": result.failed, "output": result.output}
    session.execute(insert(BatchLineRow).values(batch_id=batch_id, line=number, **values))
    row = find_batch(session, batch_id)
    counts = dict(row.data["request_counts"])
    counts["failed" if result.failed else "completed"] += 1
    usage = _added(row.data["usage"], result.usage)
    row.data = {**row.data, "request_counts": counts, "usage": usage}


def done_lines(session: Session, batch_id: str) -> set[int]:
    """Numbers of the lines that are done."""
    query = select(BatchLineRow.line).where(BatchLineRow.batch_id == batch_id)
    return set(session.scalars(query))


def drop_lines(session: Session, batch_id: str) -> None:
    """Forget the outcomes: they are in the output files now."""
    session.execute(delete(BatchLineRow).where(BatchLineRow.batch_id == batch_id))


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    """A response's usage, of either dialect, as batches have it."""
    read = usage.get("input_tokens", usage.get("prompt_tokens", 0))
    written = usage.get("output_tokens", usage.get("completion_tokens", 0))
    read_details = usage.get("input_tokens_details", usage.get("prompt_tokens_details")) or {}
    details = usage.get("output_tokens_details", usage.get("completion_tokens_details")) or {}
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": read_details.get("cached_tokens", 0)},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": read + written,
    }


def _added(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Two usages, number by number."""
    return {
        name: _added(value, right[name]) if isinstance(value, dict) else value + right[name]
        for name, value in left.items()
    }
