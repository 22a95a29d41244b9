"""Connections to SQLite or PostgreSQL, made so that neither waits for ever."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from oxillama_torch.errors import UnsupportedError

__all__ = ["open_engines", "parse_url", "reason_of"]

_CONNECT_TIMEOUT_S = 5
_STATEMENT_TIMEOUT_S = 10
_READ_CONNECTIONS = 16

_REASONS = {
    "database is locked": "the database is locked",
    "database or disk is full": "the disk is full",
    "No space left on device": "the disk is full",
    "disk I/O error": "the disk reports an error",
    "lock timeout": "the database is locked",
    "statement timeout": "the database is too slow",
}


def parse_url(store: str) -> URL:
    """The database meant by ``--store``: a URL, or the path of a SQLite file.

    Raises:
        UnsupportedError: neither SQLite nor PostgreSQL.
    """
    if "://" not in store:
        return URL.create("sqlite", database=str(Path(store).absolute()))
    try:
        url = make_url(store)
    except ArgumentError:
        raise UnsupportedError("a store URL that cannot be parsed", _KNOWN) from None
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite" or url.database in (None, "", ":memory:"):
        raise UnsupportedError(f"store {url.drivername!r}", _KNOWN)
    return url.set(database=str(Path(url.database).absolute()))


_KNOWN = ("PATH", "sqlite:///PATH", "postgresql://USER:PASSWORD@HOST/DATABASE")


def open_engines(url: URL, *, durable: bool = True) -> tuple[Engine, Engine]:
    """Engines for the one writer and for the readers.

    Args:
        durable: False: commits do not wait for the disk (a store that goes with the process).
    """
    # It logs tracebacks of connections that are lost, which whoever used them reports in a line.
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    if url.get_backend_name() == "sqlite":
        _make_private(Path(url.database))
        return _sqlite(url, "IMMEDIATE", durable, 1), _sqlite(url, "DEFERRED", durable, None)
    return _postgres(url, 1), _postgres(url, None)


def reason_of(error: Exception) -> str:
    """What is wrong with the database, in words that hold no internals."""
    seen: BaseException | None = error
    # Undoing what failed may fail in turn; the first error tells.
    while seen is not None:
        text = str(getattr(seen, "orig", None) or seen)
        for part, reason in _REASONS.items():
            if part in text:
                return reason
        seen = seen.__context__
    return "the database cannot be used"


def _make_private(path: Path) -> None:
    """SQLite gives its journals the permissions of the database file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _options(size: int | None) -> dict[str, Any]:
    return {
        "pool_size": size or _READ_CONNECTIONS,
        "max_overflow": 0,
        "pool_timeout": _CONNECT_TIMEOUT_S,
        "json_serializer": lambda value: orjson.dumps(value).decode(),
        "json_deserializer": orjson.loads,
        "hide_parameters": True,
    }


def _sqlite(url: URL, begin: str, durable: bool, size: int | None) -> Engine:
    engine = create_engine(url, connect_args={"check_same_thread": False}, **_options(size))

    @event.listens_for(engine, "connect")
    def prepare(connection, _record) -> None:
        # The driver's own transactions begin too late to be trusted; we begin them.
        connection.isolation_level = None
        for pragma in (
            # A writer that waits inside SQLite would wait unfairly; ours tries again by itself.
            f"busy_timeout = {100 if size else _CONNECT_TIMEOUT_S * 1000}",
            "journal_mode = WAL",
            f"synchronous = {'FULL' if durable else 'OFF'}",
            "foreign_keys = ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def start(connection) -> None:
        connection.exec_driver_sql(f"BEGIN {begin}")

    return engine


def _postgres(url: URL, size: int | None) -> Engine:
    settings = {
        "lock_timeout": _CONNECT_TIMEOUT_S * 1000,
        "statement_timeout": _STATEMENT_TIMEOUT_S * 1000,
        # PostgreSQL lets go of a connection whose network is gone: its successor needs the lock.
        "tcp_keepalives_idle": 10,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 3,
    }
    arguments = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        # A server that went away without a word is noticed.
        "tcp_user_timeout": _STATEMENT_TIMEOUT_S * 1000,
        "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
    }
    try:
        return create_engine(url, connect_args=arguments, pool_pre_ping=True, **_options(size))
    except (ModuleNotFoundError, NoSuchModuleError):
        raise UnsupportedError(
            "PostgreSQL without its driver: pip install 'oxillama-torch[postgres]'"
        ) from None
