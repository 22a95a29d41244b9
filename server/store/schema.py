"""The schema's version: created, upgraded, or refused when it is newer than this build."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Column, Connection, Engine, Integer, Table, inspect, select
from sqlalchemy.exc import DatabaseError

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.server.store import (
    tables_assistants,  # noqa: F401 (its tables belong to Base)
    tables_files,  # noqa: F401
)
from oxillama_torch.server.store.database import reason_of
from oxillama_torch.server.store.tables import Base

__all__ = ["UPGRADES", "VERSION", "prepare"]

VERSION = 1
# From each older version, what makes the next one of it; tables that are new need nothing here.
UPGRADES: dict[int, Callable[[Connection], None]] = {}

_version = Table("schema_version", Base.metadata, Column("version", Integer, nullable=False))


def prepare(engine: Engine) -> None:
    """Bring the database to this build's schema, in one transaction.

    Raises:
        UnsupportedError: it belongs to a newer build or to something else, or cannot be opened.
    """
    try:
        with engine.begin() as connection:
            tables = set(inspect(connection).get_table_names())
            if tables and _version.name not in tables:
                raise UnsupportedError("a store whose database holds other tables")
            _upgrade(connection, VERSION if not tables else _read(connection))
            Base.metadata.create_all(connection)
            if not tables:
                connection.execute(_version.insert().values(version=VERSION))
    except DatabaseError as error:
        text = str(error.orig)
        reason = "it is no database" if "not a database" in text else reason_of(error)
        raise UnsupportedError(f"the store cannot be opened: {reason}") from error


def _read(connection: Connection) -> int:
    return connection.execute(select(_version.c.version)).scalar_one()


def _upgrade(connection: Connection, version: int) -> None:
    if version > VERSION:
        raise UnsupportedError(
            f"a store of schema version {version}", (f"versions up to {VERSION}",)
        )
    for step in range(version, VERSION):
        UPGRADES[step](connection)
        connection.execute(_version.update().values(version=step + 1))
