"""The store on SQLite and PostgreSQL. Oracle: what was acknowledged is there, and nothing else.

Faults are real ones: another connection that holds the lock, a database that may not grow, a
PostgreSQL that is stopped.
"""

import io
import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from sqlalchemy.exc import IntegrityError
from waiting import PATIENCE_S

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.server.store import schema
from oxillama_torch.server.store.database import open_engines, parse_url
from oxillama_torch.server.store.errors import StoreError
from oxillama_torch.server.store.paging import fetch, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ConversationRow, ItemRow


@pytest.fixture
def open_store():
    stores = []

    def make(**settings):
        stores.append(Store(ServerConfig(**settings)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store, store_settings):
    return open_store(**store_settings)


def add(name, data=None):
    return lambda session: session.add(ConversationRow(id=name, data=data or {}))


def names(store):
    with store.read() as session:
        rows, more = page(session, ConversationRow, limit=10_000, order="asc")
    assert not more
    return [row.id for row in rows]


def test_rows_are_there_after_reopening(open_store, store_settings):
    data = {"z": 1, "a": [None, True, 2**70, "nul \x00, \U0001f600"], "float": 0.1}
    data["a"][2] = 2**60
    store = open_store(**store_settings)
    store.write(add("one", data))
    store.close()
    store = open_store(**store_settings)
    store.write(add("two"))
    with store.read() as session:
        row = fetch(session, ConversationRow, "one", "conversation")
    assert row.data == data
    assert list(row.data) == list(data)
    assert names(store) == ["one", "two"]


def test_failing_function_undoes_its_own_changes_only(store):
    """Also when it shares a transaction with others, which the slow first one makes sure of."""

    def slow(session):
        time.sleep(0.1)
        add("slow")(session)

    def failing(session):
        add("failing")(session)
        session.flush()
        raise KeyError("mine")

    futures = [store.submit(f) for f in (slow, add("a"), failing, add("slow"), add("b"))]
    assert isinstance(futures[2].exception(), KeyError)
    assert isinstance(futures[3].exception(), IntegrityError)
    assert all(futures[i].exception() is None for i in (0, 1, 4))
    assert names(store) == ["slow", "a", "b"]


def test_threads_write_at_once(store):
    def write(thread):
        for i in range(25):
            store.write(add(f"{thread}-{i}"))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = names(store)
    assert len(found) == 200
    for n in range(8):
        assert [name for name in found if name.startswith(f"{n}-")] == [
            f"{n}-{i}" for i in range(25)
        ]


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_pages_join_to_the_whole_list(store, order, limit):
    for parent in ("p", "q"):
        for i in range(10):
            item = ItemRow(id=f"i{i}", parent_id=parent, data={})
            store.write(lambda session, item=item: session.add(item))
    expected = [f"i{i}" for i in range(10)][:: 1 if order == "asc" else -1]

    def walk(**cursor):
        with store.read() as session:
            rows, more = page(session, ItemRow, limit=limit, order=order, parent_id="p", **cursor)
        return [row.id for row in rows], more

    forward, more, cursor = [], True, {}
    while more:
        rows, more = walk(**cursor)
        forward += rows
        cursor = {"after": rows[-1]}
    assert forward == expected
    backward, more, cursor = [], True, {"before": expected[-1]}
    while more:
        rows, more = walk(**cursor)
        backward = rows + backward
        cursor = {"before": rows[0]} if rows else {}
    assert backward == expected[:-1]


@pytest.mark.parametrize("bad", ["nothing", "", "nul\x00", "a" * 1000, "é"])
def test_unknown_ids_are_the_clients_fault(store, bad):
    with store.read() as session:
        with pytest.raises(RequestError) as error:
            fetch(session, ConversationRow, bad, "conversation")
        assert error.value.status == 404
        with pytest.raises(RequestError) as error:
            page(session, ConversationRow, limit=1, after=bad)
        assert (error.value.status, error.value.param) == (404, "after")


def test_temporary_store_goes_with_the_process(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = open_store()
    store.write(add("one"))
    assert names(store) == ["one"]
    assert list(tmp_path.iterdir())
    store.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("same_blobs", [True, False])
def test_second_server_is_refused(store_settings, open_store, tmp_path, same_blobs):
    if not same_blobs and "blobs" not in store_settings:
        pytest.skip("the blobs lie beside the file")
    open_store(**store_settings)
    code = (
        "import sys; from pathlib import Path\n"
        "from oxillama_torch.config import ServerConfig\n"
        "from oxillama_torch.server.store import store\n"
        "store._TAKE_OVER_S = 0.2\n"
        "store.Store(ServerConfig(store=sys.argv[1], blobs=Path(sys.argv[2])))\n"
    )
    blobs = store_settings.get("blobs", f"{store_settings['store']}.blobs")
    result = subprocess.run(
        [sys.executable, "-c", code, store_settings["store"],
         str(blobs if same_blobs else tmp_path / "others")],
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert "another server" in result.stderr


def test_newer_schema_is_refused_and_older_upgraded(store_settings, open_store, monkeypatch):
    store = open_store(**store_settings)
    store.write(add("one"))
    store.close()
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    monkeypatch.setitem(
        schema.UPGRADES,
        schema.VERSION - 1,
        lambda connection: connection.exec_driver_sql(
            "ALTER TABLE conversations ADD COLUMN later INTEGER"
        ),
    )
    store = open_store(**store_settings)
    assert names(store) == ["one"]
    with store.read() as session:
        assert session.connection().exec_driver_sql("SELECT later FROM conversations").all()
    store.close()
    monkeypatch.setattr(schema, "VERSION", schema.VERSION - 1)
    with pytest.raises(UnsupportedError, match="schema version"):
        open_store(**store_settings)


def test_what_is_no_store_is_refused(tmp_path, open_store):
    text = tmp_path / "text"
    text.write_text("hello" * 1000)
    with pytest.raises(UnsupportedError, match="no database"):
        open_store(store=str(text))
    assert text.read_text() == "hello" * 1000
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    with pytest.raises(UnsupportedError, match="other tables"):
        open_store(store=str(foreign))
    for url in ("mysql://x/y", "sqlite://", "://"):
        with pytest.raises(UnsupportedError):
            open_store(store=url)


def test_database_that_does_not_answer_is_told_at_start(tmp_path, open_store):
    pytest.importorskip("psycopg")
    with pytest.raises(UnsupportedError, match="cannot be opened") as error:
        open_store(store=f"postgresql://me:secret@/db?host={tmp_path}", blobs=tmp_path / "blobs")
    assert "secret" not in str(error.value)
    with pytest.raises(UnsupportedError, match="folder for blobs"):
        open_store(store="postgresql://me@/db")


def test_only_the_owner_can_read(tmp_path, open_store):
    store = open_store(store=str(tmp_path / "store.db"))
    store.write(add("one"))
    store.blobs.put(io.BytesIO(b"secret"))
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_blobs(tmp_path, open_store):
    store = open_store(store=str(tmp_path / "store.db"))
    content = os.urandom(3_000_000)
    blob_id, nbytes = store.blobs.put(io.BytesIO(content))
    assert nbytes == len(content)
    with store.blobs.open(blob_id) as file:
        assert file.read() == content
    with pytest.raises(RequestError) as error:
        store.blobs.put(io.BytesIO(content), max_bytes=len(content) - 1)
    assert error.value.status == 413
    assert list(store.blobs.ids()) == [blob_id]
    store.blobs.delete(blob_id)
    store.blobs.delete(blob_id)
    assert not list(store.blobs.ids())


def test_interrupted_blob_is_swept(tmp_path, open_store):
    folder = tmp_path / "blobs"
    folder.mkdir()
    (folder / "x.part").write_bytes(b"half")
    open_store(store=str(tmp_path / "store.db"), blobs=folder)
    assert not (folder / "x.part").exists()


def test_who_may_not_have_the_store_leaves_its_uploads_alone(tmp_path):
    folder = tmp_path / "blobs"
    folder.mkdir()
    (folder / "x.part").write_bytes(b"half")
    # Record locks are between processes.
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(folder / "lock")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UnsupportedError, match="another server"):
            Store(ServerConfig(store=str(tmp_path / "store.db"), blobs=folder))
        holder.stdin.close()
    assert (folder / "x.part").exists()


def test_what_waits_when_the_disk_fails_is_not_acknowledged(open_store):
    store = open_store()
    begun, failed = threading.Event(), threading.Event()

    def slow(session):
        begun.set()
        assert failed.wait(PATIENCE_S)

    first = store.submit(slow)
    assert begun.wait(PATIENCE_S)
    waiting = store.submit(lambda session: session.add(ConversationRow(id="a", data={})))
    store._writer.failed = "the disk reports an error"
    failed.set()
    first.exception(PATIENCE_S)
    with pytest.raises(StoreError, match="disk"):
        waiting.result(PATIENCE_S)


def test_locked_database_is_503_in_time(tmp_path, open_store, monkeypatch):
    monkeypatch.setattr("oxillama_torch.server.store.writer.PATIENCE_S", 0.3)
    path = tmp_path / "store.db"
    store = open_store(store=str(path))
    store.write(add("before"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    start = time.monotonic()
    with pytest.raises(StoreError, match="locked") as error:
        store.write(add("during"))
    assert error.value.status == 503
    assert time.monotonic() - start < 60
    assert names(store) == ["before"]
    other.rollback()
    other.close()
    store.write(add("after"))
    assert names(store) == ["before", "after"]


def test_write_waits_out_a_short_lock(tmp_path, open_store, monkeypatch):
    monkeypatch.setattr("oxillama_torch.server.store.writer.PATIENCE_S", PATIENCE_S)
    path = tmp_path / "store.db"
    store = open_store(store=str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    future = store.submit(add("patient"))
    time.sleep(0.3)
    assert not future.done()
    other.rollback()
    other.close()
    assert future.result(timeout=PATIENCE_S) is None
    assert names(store) == ["patient"]


def test_full_disk_is_503_and_loses_nothing(tmp_path, open_store):
    """SQLite's page limit makes the same error as a full disk."""
    store = open_store(store=str(tmp_path / "store.db"))
    store.write(add("before"))

    def limit(pages):
        def set_limit(session):
            session.connection().exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        store.write(set_limit)

    limit(1)
    large = {"text": "x" * 1_000_000}
    futures = [store.submit(add(f"large{i}", large)) for i in range(3)]
    for future in futures:
        with pytest.raises(StoreError, match="disk is full"):
            future.result(timeout=PATIENCE_S)
    assert names(store) == ["before"]
    limit(1_000_000)
    store.write(add("after", large))
    assert names(store) == ["before", "after"]


def test_stopped_postgres_is_503_and_comes_back(postgres, tmp_path, open_store, monkeypatch):
    monkeypatch.setattr("oxillama_torch.server.store.writer.PATIENCE_S", 0.3)
    store = open_store(store=postgres.database(), blobs=tmp_path)
    store.write(add("before"))
    postgres.stop()
    try:
        with pytest.raises(StoreError):
            store.write(add("during"))
        with pytest.raises(StoreError), store.read() as session:
            fetch(session, ConversationRow, "before", "conversation")
    finally:
        postgres.start()
    store.write(add("after"))
    assert names(store) == ["before", "after"]


def test_start_hooks_run_once(store):
    calls = []
    store.on_start(lambda: calls.append(1))
    store.start()
    store.start()
    assert calls == [1]


def test_closed_store_refuses(store):
    store.write(add("one"))
    store.close()
    with pytest.raises(StoreError):
        store.write(add("two"))


def test_a_connection_that_dies_under_a_cursor_leaves_no_traceback_in_the_log(tmp_path, caplog):
    class Cursor:
        def close(self):
            raise sqlite3.OperationalError("server closed the connection")

    writer, _ = open_engines(parse_url(str(tmp_path / "store.db")))
    with writer.connect() as connection:
        connection._safe_close_cursor(Cursor())
    assert not caplog.records
