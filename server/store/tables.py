"""Tables: what every row has, and the rows of responses, conversations and stored completions."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import JSON, BigInteger, LargeBinary
from sqlalchemy.orm import DeclarativeBase, Mapped, deferred, mapped_column

__all__ = [
    "Base",
    "CompletionRow",
    "ConversationRow",
    "ItemRow",
    "OwnedRow",
    "ResponseRow",
    "Row",
]


class Base(DeclarativeBase):
    """All tables of the store."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}


class Row(Base):
    """What every row has.

    ``data`` is the object as it goes over the wire. A change inside of it is not noticed: assign
    a new one. ``seq`` orders rows by creation; the writer numbers them.
    """

    __abstract__ = True

    id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, unique=True)
    created_at: Mapped[int] = mapped_column(BigInteger, default=lambda: int(time.time()))
    data: Mapped[dict[str, Any]]


class OwnedRow(Row):
    """What can be asked for by its id alone: ``owner`` is whose it is, see ``store.owner``.

    Other rows belong to one of these and are asked for through it.
    """

    __abstract__ = True

    owner: Mapped[str | None] = mapped_column(index=True)


class ResponseRow(OwnedRow):
    """A response: ``data`` is the response object.

    ``input`` holds its own input items, ``request`` the body it was created with, ``events`` the
    stream of a background response, one JSON object a line.
    """

    __tablename__ = "responses"

    status: Mapped[str] = mapped_column(index=True)
    input: Mapped[list[Any]]
    request: Mapped[dict[str, Any]]
    attempts: Mapped[int] = mapped_column(default=0)
    events: Mapped[bytes | None] = deferred(mapped_column(LargeBinary))


class ConversationRow(OwnedRow):
    """A conversation: ``data`` is the conversation object."""

    __tablename__ = "conversations"


class ItemRow(Row):
    """An item of a conversation, or one that a response has put out: ``parent_id`` says which.

    Its id is unique within its parent only.
    """

    __tablename__ = "items"

    parent_id: Mapped[str] = mapped_column(primary_key=True)


class CompletionRow(OwnedRow):
    """A stored chat completion: ``data`` is the completion, ``messages`` what it answers."""

    __tablename__ = "chat_completions"

    model: Mapped[str] = mapped_column(index=True)
    messages: Mapped[list[Any]]
