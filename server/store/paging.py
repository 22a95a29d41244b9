"""Rows by id and by cursor."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, select
from sqlalchemy.orm import Session

from oxillama_torch.errors import RequestError
from oxillama_torch.server.store.tables import Row

__all__ = ["fetch", "not_found", "page", "valid_id"]

R = TypeVar("R", bound=Row)

_VALID_ID = re.compile(r"[\w.:-]{1,256}", re.ASCII)


def valid_id(row_id: str) -> bool:
    """Whether a client's id can be anybody's: PostgreSQL refuses some texts altogether."""
    return _VALID_ID.fullmatch(row_id) is not None


def not_found(kind: str, row_id: str, param: str | None = None) -> RequestError:
    """The 404 for an object that is not there."""
    return RequestError(
        f"No {kind} found with id '{row_id[:256]}'.", status=404, code="not_found", param=param
    )


def fetch(session: Session, table: type[R], row_id: str, kind: str, **filters: Any) -> R:
    """The row with an id.

    Args:
        kind: what it is, for the message.
        filters: columns and the values that they must have.

    Raises:
        RequestError: 404.
    """
    if valid_id(row_id):
        row = session.scalar(_where(select(table), table, {"id": row_id, **filters}))
        if row is not None:
            return row
    raise not_found(kind, row_id)


def page(
    session: Session,
    table: type[R],
    *,
    limit: int,
    order: str = "desc",
    after: str | None = None,
    before: str | None = None,
    **filters: Any,
) -> tuple[list[R], bool]:
    """One page of a cursor list: at most ``limit`` rows, and whether there are more.

    Args:
        order: ``asc`` or ``desc`` by creation.
        after, before: ids of the rows that the page begins after or ends before.
        filters: columns and the values that they must have; ``metadata.KEY`` for those of objects.

    Raises:
        RequestError: 404, a cursor names no row of the list.
    """
    query = _where(select(table), table, filters)
    for name, cursor in (("after", after), ("before", before)):
        if cursor is not None:
            seq = _position(session, table, name, cursor, filters)
            later = (order == "asc") == (name == "after")
            query = query.where(table.seq > seq if later else table.seq < seq)
    # A page that ends before a row is counted from its end.
    backward = before is not None and after is None
    ascending = (order == "asc") != backward
    query = query.order_by(table.seq.asc() if ascending else table.seq.desc()).limit(limit + 1)
    rows = list(session.scalars(query))
    has_more, rows = len(rows) > limit, rows[:limit]
    return (rows[::-1] if backward else rows), has_more


def _where(query: Select, table: type[Row], filters: dict[str, Any]) -> Select:
    return query.where(*(_is(table, name, value) for name, value in filters.items()))


def _is(table: type[Row], name: str, value: Any) -> ColumnElement[bool]:
    prefix, _, key = name.partition(".")
    if prefix == "metadata":
        return table.data[("metadata", key)].as_string() == value
    return getattr(table, name) == value


def _position(
    session: Session, table: type[Row], name: str, cursor: str, filters: dict[str, Any]
) -> int:
    query = select(table.seq).where(table.id == cursor)
    seq = session.scalar(_where(query, table, filters)) if valid_id(cursor) else None
    if seq is None:
        raise not_found("object of this list", cursor, name)
    return seq
