"""A disk that is full and a database that is locked, as clients see them.

Oracles: what was acknowledged, and the file system of a small tmpfs (where one can be mounted).
"""

import io
import os
import sqlite3
import subprocess

import pytest

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.app import close_app, create_app

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
