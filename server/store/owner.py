"""Whose objects a session sees, and whose the new ones are.

Every object that can be asked for by its id has an owner (``OwnedRow``): what the caller's key
stands for, or nobody where callers need no key. A session belongs to one owner: it finds the rows
of that owner alone, whatever query asks for them, and what is added to it becomes that owner's.
The server's own work (taking up what a crash cut, deleting what has expired) sees everything, and
must say whose a new object is. A thread that was told nothing is nobody's.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from contextvars import ContextVar

from sqlalchemy import ColumnElement, event
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria

from oxillama_torch.server.store.tables import OwnedRow

__all__ = ["SERVER", "Owner", "act_for", "acting_for", "current_owner", "is_own", "restrict"]


class _Server(enum.Enum):
    SERVER = "server"


#: The server itself, who sees every object and owns none.
SERVER = _Server.SERVER

#: None: nobody in particular, where callers need no key.
Owner = str | None | _Server

_current: ContextVar[Owner] = ContextVar("owner", default=None)


def current_owner() -> Owner:
    """On whose behalf this thread is acting."""
    return _current.get()


def act_for(owner: Owner) -> None:
    """From now on, this thread acts on somebody's behalf."""
    _current.set(owner)


@contextlib.contextmanager
def acting_for(owner: Owner) -> Iterator[None]:
    """Act on somebody's behalf within the block."""
    token = _current.set(owner)
    try:
        yield
    finally:
        _current.reset(token)


def is_own(table: type[OwnedRow], owner: Owner) -> ColumnElement[bool]:
    """Whether rows of a table are an owner's; SERVER has no own."""
    assert owner is not SERVER, "the server owns nothing"
    return table.owner.is_(None) if owner is None else table.owner == owner


def restrict(session: Session, owner: Owner) -> None:
    """From now on, a session belongs to ``owner``: those of one transaction may follow each other.

    Rows that the session knows already are not forgotten: ask for them by a query, not by
    ``session.get``.
    """
    if "owner" not in session.info:
        event.listen(session, "do_orm_execute", _filter)
        event.listen(session, "before_attach", _claim)
    session.info["owner"] = owner


def _filter(state: ORMExecuteState) -> None:
    owner = state.session.info["owner"]
    if owner is SERVER or not (state.is_select or state.is_update or state.is_delete):
        return
    if state.is_column_load or state.is_relationship_load:
        return  # of a row that the session has already
    conditions = [with_loader_criteria(table, is_own(table, owner)) for table in _owned_tables()]
    state.statement = state.statement.options(*conditions)


def _owned_tables() -> list[type[OwnedRow]]:
    return OwnedRow.__subclasses__()


def _claim(session: Session, row: object) -> None:
    """A new row is the session's owner's, unless it says whose it is."""
    if isinstance(row, OwnedRow) and "owner" not in vars(row):
        owner = session.info["owner"]
        assert owner is not SERVER, "the server's own work says whose an object is"
        row.owner = owner
