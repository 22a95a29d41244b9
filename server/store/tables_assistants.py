"""Rows of assistants, threads, messages, runs and their steps."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from oxillama_torch.server.store.tables import OwnedRow, Row

__all__ = ["AssistantRow", "MessageRow", "RunRow", "StepRow", "ThreadRow"]


class AssistantRow(OwnedRow):
    """An assistant: ``data`` is the assistant object."""

    __tablename__ = "assistants"


class ThreadRow(OwnedRow):
    """A thread: ``data`` is the thread object."""

    __tablename__ = "threads"


class MessageRow(Row):
    """A message: ``data`` is the message object."""

    __tablename__ = "thread_messages"

    thread_id: Mapped[str] = mapped_column(index=True)
    run_id: Mapped[str | None] = mapped_column(index=True)


class RunRow(Row):
    """A run: ``data`` is the run object; ``usage`` counts its tokens until it has ended."""

    __tablename__ = "runs"

    thread_id: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(index=True)
    expires_at: Mapped[int] = mapped_column(BigInteger)
    usage: Mapped[dict[str, Any]]


class StepRow(Row):
    """A step of a run: ``data`` is the step object."""

    __tablename__ = "run_steps"

    thread_id: Mapped[str] = mapped_column(index=True)
    run_id: Mapped[str] = mapped_column(index=True)
