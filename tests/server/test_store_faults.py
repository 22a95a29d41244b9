"""A disk that is full and a database that is locked, as clients see them.

Oracles: what was acknowledged, and the file system of a small tmpfs (where one can be mounted).
"""

import io
import json
import os
import sqlite3
import subprocess

import pytest
from waiting import until

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.app import close_app, create_app
from oxillama_torch.server.assistants import job, records

SIZE_BYTES = 4 * 1024 * 1024


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tests", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def upload(client, content):
    """(status, id) of a file."""
    data = {"file": (io.BytesIO(content), "x"), "purpose": "user_data"}
    answer = client.post("/v1/files", data=data)
    return answer.status_code, answer.get_json().get("id")


def converse(client, text):
    """(status, id) of a conversation; what is refused is told to come back."""
    item = {"type": "message", "role": "user", "content": text}
    answer = client.post("/v1/conversations", json={"items": [item]})
    if answer.status_code != 200:
        assert (answer.status_code, answer.get_json()["error"]["code"]) == (
            503, "store_unavailable",
        )  # fmt: skip
        assert int(answer.headers["Retry-After"]) >= 1
    return answer.status_code, answer.get_json().get("id")


def check(client, files, conversations):
    """All that was acknowledged is there, whole."""
    for file_id, content in files.items():
        assert client.get(f"/v1/files/{file_id}/content").get_data() == content
    for conversation_id, text in conversations.items():
        [item] = client.get(f"/v1/conversations/{conversation_id}/items").get_json()["data"]
        assert item["content"][0]["text"] == text


def fill(client, files, conversations):
    """Write until neither a file nor a row of any size fits; returns how often it was refused."""
    refused = 0
    for nbytes in (200_000, 20_000, 2_000):
        for make, kept, content in (
            (upload, files, os.urandom(nbytes)),
            (converse, conversations, "x" * nbytes),
        ):
            while True:
                status, made = make(client, content)
                if status == 503:
                    refused += 1
                    break
                assert status == 200
                kept[made] = content
    return refused


def test_a_full_disk_refuses_what_it_cannot_keep(llm, small_disk):
    """Nothing acknowledged is lost; with room again the same server goes on."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    settings = {"store": str(small_disk / "store.db")}
    app = create_app(ServerConfig(**settings), llm)
    client, files, conversations = app.test_client(), {}, {}
    assert fill(client, files, conversations) == 6
    assert files and conversations
    check(client, files, conversations)
    assert client.get("/health").status_code == 200
    assert not list(small_disk.glob("**/*.part"))
    ballast.unlink()
    for make, kept, content in ((upload, files, b"after"), (converse, conversations, "after")):
        status, made = make(client, content)
        assert status == 200
        kept[made] = content
    close_app(app)
    app = create_app(ServerConfig(**settings), llm)
    check(app.test_client(), files, conversations)
    close_app(app)


def test_a_locked_database_is_told_and_got_over(make_app, tmp_path, monkeypatch):
    """Another process holds the database: reading goes on, writing is refused until it lets go."""
    monkeypatch.setattr("oxillama_torch.server.store.writer.PATIENCE_S", 0.3)
    client = make_app(store=str(tmp_path / "store.db")).test_client()
    status, first = converse(client, "before")
    assert status == 200
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert converse(client, "during")[0] == 503
    assert upload(client, b"during")[0] == 503
    check(client, {}, {first: "before"})
    other.rollback()
    other.close()
    status, second = converse(client, "after")
    assert status == 200
    check(client, {}, {first: "before", second: "after"})
    assert client.get("/v1/files").get_json()["data"] == []


def begin_run(client, model):
    fields = {"model": model, "thread": {"messages": [{"role": "user", "content": "Hi"}]}}
    run = client.post("/v1/threads/runs", json=fields).get_json()
    return f"/v1/threads/{run['thread_id']}/runs/{run['id']}"


def begin_response(client, model):
    fields = {"model": model, "input": "Hi", "max_output_tokens": 20, "background": True}
    answer = client.post("/v1/responses", json={**fields, "ignore_eos": True})
    return f"/v1/responses/{answer.get_json()['id']}"


def begin_batch(client, model):
    body = {"model": model, "prompt": "x", "max_tokens": 10}
    lines = "\n".join(json.dumps({"custom_id": str(n), "body": body}) for n in range(3))
    data = {"file": (io.BytesIO(lines.encode()), "x.jsonl"), "purpose": "batch"}
    fields = {"input_file_id": client.post("/v1/files", data=data).get_json()["id"]}
    fields |= {"endpoint": "/v1/completions", "completion_window": "24h"}
    return f"/v1/batches/{client.post('/v1/batches', json=fields).get_json()['id']}"


@pytest.mark.parametrize("begin", [begin_run, begin_response, begin_batch])
def test_what_was_acknowledged_ends_after_the_database_was_locked(
    make_app, model_id, tmp_path, monkeypatch, caplog, begin
):
    """Its end meets the lock, and waits for it as long as it takes."""
    monkeypatch.setattr("oxillama_torch.server.store.writer.PATIENCE_S", 0.3)
    client = make_app(store=str(tmp_path / "store.db")).test_client()
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    path = begin(client, model_id)
    other.execute("BEGIN IMMEDIATE")
    refused = "the store cannot write: the database is locked"
    until(lambda: caplog.messages.count(refused) > 2, "nothing meets the lock")
    assert client.get(path).get_json()["status"] in ("queued", "in_progress", "validating")
    other.rollback()
    other.close()
    ended = ("completed", "incomplete")
    until(lambda: client.get(path).get_json()["status"] in ended, "it hangs")


def test_a_run_whose_end_cannot_be_written_has_failed(make_app, model_id, monkeypatch):
    """Not for want of a store: what is to be written is refused itself."""

    def refuse(session, objects, usage):
        if any(data["object"] == "thread.run" and data["usage"] for data in objects):
            raise ValueError("no such row")
        records.save(session, objects, usage)

    monkeypatch.setattr(job, "save", refuse)
    client = make_app().test_client()
    path = begin_run(client, model_id)
    until(lambda: client.get(path).get_json()["status"] == "failed", "it hangs")
    run = client.get(path).get_json()
    assert run["last_error"] == {"code": "server_error", "message": "internal error"}
    assert run["failed_at"] and "no such row" not in json.dumps(run)
    fields = {"model": model_id, "thread": {"messages": [{"role": "user", "content": "Hi"}]}}
    answer = client.post("/v1/threads/runs", json={**fields, "stream": True})
    events = answer.get_data(as_text=True).split("\n\n")
    assert events[-3].startswith("event: error\n") and events[-2] == "event: done\ndata: [DONE]"
