"""The store: one writer, many readers, blobs, and what is done once at start."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, event, func, select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.server.store import schema
from oxillama_torch.server.store.blobs import Blobs
from oxillama_torch.server.store.database import open_engines, parse_url, reason_of
from oxillama_torch.server.store.errors import StoreError
from oxillama_torch.server.store.owner import current_owner, restrict
from oxillama_torch.server.store.tables import Base
from oxillama_torch.server.store.writer import Writer

__all__ = ["Store"]

T = TypeVar("T")

# A worker that takes over from one that is ending waits for it so long.
_TAKE_OVER_S = 5.0
_LONGEST_WRITE_S = 60.0
# Any number that nobody else uses in this database: "oxillama" in ASCII.
_DATABASE_LOCK = 0x6F78696C6C616D61


class Store:
    """Rows and blobs of one server.

    Args:
        config: ``store`` is a SQLite file or a URL; None: a private one that goes with the process.

    Raises:
        UnsupportedError: cannot be opened, is newer than this build, or is in use.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._start_hooks: list[Callable[[], None]] = []
        with contextlib.ExitStack() as opened:
            self._open(config, opened)
            self._opened = opened.pop_all()

    def _open(self, config: ServerConfig, opened: contextlib.ExitStack) -> None:
        location = config.store
        if location is None:
            prefix = "oxillama-store-"
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix=prefix))
            location = os.path.join(folder, "store.db")
        url = parse_url(location)
        folder = _blob_folder(url.database, url.get_backend_name(), config.blobs)
        self.blobs = Blobs(folder)
        opened.callback(os.close, _lock(folder))
        self.blobs.remove_parts()
        writing, self._reading = open_engines(url, durable=config.store is not None)
        opened.callback(self._reading.dispose)
        opened.callback(writing.dispose)
        if url.get_backend_name() == "postgresql":
            event.listen(writing, "connect", _hold_database)
            _wait_for(lambda: _connects(writing))
        schema.prepare(writing)
        with writing.connect() as connection:
            tables = [t for t in Base.metadata.tables.values() if "seq" in t.columns]
            seqs = [connection.scalar(select(func.max(t.c.seq))) or 0 for t in tables]
        self._writer = Writer(writing, max(seqs))
        opened.callback(self._writer.close)

    @property
    def healthy(self) -> bool:
        """False once the disk has failed under a commit: nothing is acknowledged any more."""
        return self._writer.failed is None

    def submit(self, function: Callable[[Session], T]) -> Future[T]:
        """As ``write``, without waiting. The future's callbacks run on the writing thread."""
        return self._writer.submit(function, current_owner())

    def write(self, function: Callable[[Session], T]) -> T:
        """Run ``function(session)`` and return its result once its changes are on the disk.

        The session belongs to whom this thread acts for, as that of ``read``. The function may be
        run again, when the database or another function of its group fails: so it must change
        nothing but rows.

        Raises:
            what it raises: its changes alone are undone. StoreError: locked, full, gone.
        """
        try:
            return self.submit(function).result(timeout=_LONGEST_WRITE_S)
        except FutureTimeout:
            raise StoreError("the database is too slow") from None

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; rows stay usable after the block.

        It finds what belongs to whom this thread acts for: see ``store.owner``.

        Raises:
            StoreError: locked, gone.
        """
        try:
            with Session(self._reading, expire_on_commit=False) as session:
                restrict(session, current_owner())
                yield session
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise StoreError(reason_of(error)) from error

    def on_start(self, hook: Callable[[], None]) -> None:
        """Have ``hook`` called once, when the application is complete: for what a crash cut."""
        self._start_hooks.append(hook)

    def start(self) -> None:
        """Call the start hooks."""
        for hook in self._start_hooks:
            hook()
        self._start_hooks.clear()

    def close(self) -> None:
        """Write what waits and let go of the database."""
        self._opened.close()


def _blob_folder(database: str, backend: str, configured: Path | None) -> Path:
    if configured is not None:
        return configured
    if backend != "sqlite":
        raise UnsupportedError("a PostgreSQL store without a folder for blobs (--blobs)")
    return Path(f"{database}.blobs")


def _lock(folder: Path) -> int:
    """Hold the store for this process: a second server would take over what the first is doing."""
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def try_lock() -> bool:
        try:
            # A record lock: it belongs to this process, not to children that inherit the file.
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    try:
        _wait_for(try_lock)
    except UnsupportedError:
        os.close(fd)
        raise
    return fd


def _hold_database(connection: Any, _record: object) -> None:
    """Hold a database that servers on other machines reach too.

    The connection that writes holds it: one that is lost loses it, and its successor takes it again
    before it can write anything.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s)", (_DATABASE_LOCK,))
        [held] = cursor.fetchone()
    connection.rollback()  # the lock is the session's, not the transaction's
    if not held:
        raise StoreError("another server is using it")


def _connects(engine: Engine) -> bool:
    """False: another server holds the database."""
    try:
        engine.connect().close()
    except StoreError:
        return False
    except OperationalError as error:
        raise UnsupportedError(f"the store cannot be opened: {reason_of(error)}") from error
    return True


def _wait_for(try_lock: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _TAKE_OVER_S
    while not try_lock():
        if time.monotonic() > deadline:
            raise UnsupportedError("a store that another server is using")
        time.sleep(0.05)
