"""Rows of files and batches."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ForeignKey, LargeBinary
from sqlalchemy.orm import Mapped, mapped_column

from oxillama_torch.server.store.tables import Base, OwnedRow

__all__ = ["BatchLineRow", "BatchRow", "FileRow"]


class FileRow(OwnedRow):
    """A file: ``data`` is the file object, ``blob`` names its content."""

    __tablename__ = "files"

    blob: Mapped[str] = mapped_column(index=True)
    purpose: Mapped[str] = mapped_column(index=True)
    expires_at: Mapped[int | None] = mapped_column(BigInteger, index=True)


class BatchRow(OwnedRow):
    """A batch: ``data`` is the batch object.

    ``blob`` is the content of its input file, which may be deleted meanwhile. ``options`` is what
    the object does not show.
    """

    __tablename__ = "batches"

    status: Mapped[str] = mapped_column(index=True)
    blob: Mapped[str] = mapped_column(index=True)
    options: Mapped[dict[str, Any]]


class BatchLineRow(Base):
    """The outcome of one line of a batch that is not finalized yet."""

    __tablename__ = "batch_lines"

    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    failed: Mapped[bool]
    output: Mapped[bytes] = mapped_column(LargeBinary)
