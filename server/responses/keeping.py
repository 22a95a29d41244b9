"""Responses and conversations in the store: what is written, found, and read as context."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from oxillama_torch.errors import RequestError
from oxillama_torch.server.store.owner import SERVER, Owner, acting_for, is_own
from oxillama_torch.server.store.paging import fetch, valid_id
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ConversationRow, ItemRow, ResponseRow

__all__ = [
    "add_items",
    "cancel_unstarted",
    "delete_response",
    "find_item",
    "find_response",
    "history",
    "save_finished",
    "save_queued",
]

Item = dict[str, Any]

_LONGEST_CHAIN = 10_000
_MOST_ITEMS = 10_000


def find_response(session: Session, response_id: str) -> ResponseRow:
    """A stored response.

    Raises:
        RequestError: 404.
    """
    return fetch(session, ResponseRow, response_id, "response")


def find_item(session: Session, item_id: str) -> Item | None:
    """An item that one of the session's responses has produced or its conversations hold."""
    query = select(ItemRow).where(ItemRow.id == item_id).order_by(ItemRow.seq).limit(1)
    owner = session.info["owner"]
    own = (
        select(table.id).where(table.id == ItemRow.parent_id, is_own(table, owner)).exists()
        for table in (ResponseRow, ConversationRow)
    )
    row = session.scalar(query.where(or_(*own))) if valid_id(item_id) else None
    return None if row is None else row.data


def history(session: Session, previous_id: str | None, conversation_id: str | None) -> list[Item]:
    """The items before a turn, oldest first.

    Raises:
        RequestError: 400 or 404, what the turn builds on is not there.
    """
    if conversation_id is not None:
        fetch(session, ConversationRow, conversation_id, "conversation")
        return _conversation_items(session, conversation_id)
    turns: list[list[Item]] = []
    while previous_id is not None:
        query = select(ResponseRow).where(ResponseRow.id == previous_id)
        row = session.scalar(query) if valid_id(previous_id) else None
        if row is None:
            raise _no_previous(previous_id)
        if row.status in ("queued", "in_progress"):
            raise RequestError(
                f"Response '{previous_id}' is still in progress.", param="previous_response_id"
            )
        if len(turns) >= _LONGEST_CHAIN:
            raise RequestError("the chain of responses is too long", param="previous_response_id")
        turns.append([*row.input, *row.data["output"]])
        if row.data["conversation"] is not None:
            turns.append(_conversation_items(session, row.data["conversation"]["id"], row.seq))
        previous_id = row.data["previous_response_id"]
    return [item for turn in reversed(turns) for item in turn]


def _no_previous(previous_id: str) -> RequestError:
    return RequestError(
        f"Previous response with id '{previous_id[:256]}' not found.",
        code="previous_response_not_found",
        param="previous_response_id",
    )


def _conversation_items(
    session: Session, conversation_id: str, before_seq: int | None = None
) -> list[Item]:
    query = select(ItemRow).where(ItemRow.parent_id == conversation_id).order_by(ItemRow.seq)
    if before_seq is not None:
        query = query.where(ItemRow.seq < before_seq)
    rows = session.scalars(query.limit(_MOST_ITEMS + 1)).all()
    if len(rows) > _MOST_ITEMS:
        raise RequestError(f"more than {_MOST_ITEMS} items", param="conversation")
    return [row.data for row in rows]


def add_items(session: Session, parent_id: str, items: list[Item]) -> None:
    """Append items to a conversation, or a response's output to the items that can be named.

    One that is there already is left as it is: clients may send it again with the next turn.
    """
    ids = [item["id"] for item in items]
    query = select(ItemRow.id).where(ItemRow.parent_id == parent_id, ItemRow.id.in_(ids))
    there = set(session.scalars(query))
    for item in items:
        if item["id"] not in there:
            there.add(item["id"])
            session.add(ItemRow(id=item["id"], parent_id=parent_id, data=item))
    session.flush()


def save_queued(store: Store, response: dict, items: list[Item], request: dict) -> None:
    """Keep a background response that has not begun, with all it takes to begin it again."""

    def write(session: Session) -> None:
        session.add(
            ResponseRow(
                id=response["id"],
                created_at=response["created_at"],
                status=response["status"],
                data=response,
                input=items,
                request=request,
            )
        )

    store.write(write)


def save_finished(
    store: Store,
    owner: Owner,
    response: dict,
    items: list[Item],
    request: dict,
    events: bytes | None,
) -> Future:
    """Keep a response that has ended; the future is done when that is on the disk."""

    def write(session: Session) -> None:
        row = session.get(ResponseRow, response["id"])
        if row is None:
            if response["background"]:
                return  # It has been deleted.
            row = ResponseRow(id=response["id"], owner=owner, input=items, request=request)
            session.add(row)
        row.created_at = response["created_at"]
        row.status, row.data, row.events = response["status"], response, events
        session.flush()
        add_items(session, response["id"], response["output"])
        conversation = (response["conversation"] or {}).get("id")
        # It may have been deleted meanwhile.
        if conversation is not None and session.get(ConversationRow, conversation) is not None:
            add_items(session, conversation, [*items, *response["output"]])

    with acting_for(SERVER):  # this thread is nobody's
        return store.submit(write)


def cancel_unstarted(store: Store, response_id: str) -> None:
    """Mark a response that nothing works on (it waits to be taken up again) as cancelled."""

    def write(session: Session) -> None:
        row = find_response(session, response_id)
        if row.status in ("queued", "in_progress"):
            row.status = "cancelled"
            row.data = {**row.data, "status": "cancelled"}

    store.write(write)


def delete_response(store: Store, response_id: str) -> None:
    """Forget a response.

    Raises:
        RequestError: 404.
    """

    def write(session: Session) -> None:
        session.delete(find_response(session, response_id))
        session.execute(delete(ItemRow).where(ItemRow.parent_id == response_id))

    store.write(write)
