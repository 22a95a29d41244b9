"""Files. Oracles: the openai SDK's models and client, the bytes that were sent."""

import io
import os
import socket
import threading
import tracemalloc

import pytest
from openai import NotFoundError
from openai.types import FileDeleted, FileObject
from sdk_over_app import sdk_over
from waiting import PATIENCE_S

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.openai.files import MOST_UPLOADS
from oxillama_torch.server.store.files import add_file, sweep_blobs
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.upload import _time_limit


@pytest.fixture
def app(make_app):
    return make_app(max_file_bytes=3_000_000, max_body_bytes=10_000)


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def sdk(app):
    with sdk_over(app) as sdk:
        yield sdk


def upload(client, content=b"{}\n", name="a.jsonl", **fields):
    parts = [
        f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode()
        for key, value in {"purpose": "batch", **fields}.items()
        if value is not None
    ]
    head = f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    parts.append(head.encode() + content)
    body = b"".join(b"--boundary\r\n%b\r\n" % part for part in parts) + b"--boundary--\r\n"
    kind = "multipart/form-data; boundary=boundary"
    return client.post("/v1/files", data=body, content_type=kind)


def blobs(app):
    return sorted(app.extensions["store"].blobs.ids())


def test_a_file_comes_back_as_it_went(client, app):
    content = os.urandom(2_500_000) + b"\r\n--"
    made = upload(client, content, "data/../../etc/x\x07.jsonl")
    assert made.status_code == 200
    made = FileObject.model_validate(made.get_json(), strict=True)
    assert (made.bytes, made.filename, made.purpose) == (len(content), "x.jsonl", "batch")
    assert client.get(f"/v1/files/{made.id}").get_json()["id"] == made.id
    answer = client.get(f"/v1/files/{made.id}/content")
    assert answer.data == content and answer.content_length == len(content)
    gone = FileDeleted.model_validate(client.delete(f"/v1/files/{made.id}").get_json())
    assert gone.deleted and gone.id == made.id
    for path in (f"/v1/files/{made.id}", f"/v1/files/{made.id}/content"):
        assert client.get(path).status_code == 404
    assert client.delete(f"/v1/files/{made.id}").status_code == 404
    assert blobs(app) == []


def test_a_field_may_be_json(client):
    after = '{"anchor": "created_at", "seconds": 3600}'
    made = upload(client, expires_after=after).get_json()
    assert made["expires_at"] == made["created_at"] + 3600
    assert upload(client, expires_after="{").status_code == 400


def test_the_sdks_client(sdk):
    after = {"anchor": "created_at", "seconds": 3600}
    made = sdk.files.create(file=b"hello", purpose="user_data", expires_after=after)
    assert made.expires_at == made.created_at + 3600
    assert sdk.files.retrieve(made.id) == made
    assert sdk.files.content(made.id).read() == b"hello"
    others = [sdk.files.create(file=("b", b"x" * n), purpose="batch") for n in range(5)]
    wanted = [file.id for file in reversed(others)]
    assert [f.id for f in sdk.files.list(purpose="batch", limit=2)] == wanted
    assert [f.id for f in sdk.files.list(order="asc")][0] == made.id
    assert sdk.files.delete(made.id).deleted
    with pytest.raises(NotFoundError):
        sdk.files.retrieve(made.id)
    with pytest.raises(NotFoundError) as error:
        sdk.files.list(after="file-none")
    assert error.value.param == "after"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "other"}, "purpose"),
        ({"purpose": None}, "purpose"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"expires_after": "1", "expires_after[anchor]": "created_at"}, "expires_after"),
        (
            {"expires_after[anchor]": "created_at", "expires_after[seconds]": "10"},
            "expires_after.seconds",
        ),
        (
            {"expires_after[anchor]": "now", "expires_after[seconds]": "3600"},
            "expires_after.anchor",
        ),
    ],
)
def test_bad_field_is_named_and_nothing_kept(client, app, fields, param):
    response = upload(client, **fields)
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == param
    assert blobs(app) == []


def test_a_file_that_is_too_large(client, app):
    response = upload(client, b"x" * 3_000_001)
    assert response.status_code == 413
    assert response.get_json()["error"]["code"] == "request_too_large"
    assert upload(client, b"x" * 5_000_000).status_code == 413
    assert blobs(app) == []
    assert upload(client, b"x" * 3_000_000).status_code == 200


def test_other_routes_keep_their_limit(client):
    body = {"model": "x", "prompt": "y" * 20_000}
    assert client.post("/v1/completions", json=body).status_code == 413


BODY = (
    b"--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\nbatch\r\n"
    b'--b\r\nContent-Disposition: form-data; name=file; filename="a"\r\n\r\nabc\r\n--b--\r\n'
)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        BODY[:50],
        BODY[:-20],
        BODY[:-8],
        BODY.replace(b"name=file", b"name=other"),
        BODY.replace(b"name=file", b"nom=file"),
        BODY.replace(b"Content-Disposition", b"X"),
        BODY.replace(b"--b--\r\n", b"") + BODY[BODY.index(b"--b\r\n", 5) :],
        BODY.replace(b"purpose", b"\xff\xfe"),
        b"--b\r\n" + b"A: b\r\n" * 200_000,
    ],
    ids=str,
)
def test_malformed_bodies(client, app, body):
    form = {"content_type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/files", data=BODY, **form).status_code == 200
    kept = blobs(app)
    assert client.post("/v1/files", data=body, **form).status_code in (400, 413)
    assert blobs(app) == kept


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "multipart/form-data; boundary=c"]
)
def test_bodies_of_another_kind(client, kind):
    assert client.post("/v1/files", data=BODY, content_type=kind).status_code == 400


def test_every_cut_of_a_body_is_400(client, app):
    for cut in range(len(BODY) - 6):
        response = client.post(
            "/v1/files", data=BODY[:cut], content_type="multipart/form-data; boundary=b"
        )
        assert response.status_code == 400, cut
    assert blobs(app) == []


def test_an_upload_is_not_held_in_memory(client):
    content = b"x" * 2_900_000
    upload(client, b"x")
    tracemalloc.start()
    body = io.BytesIO(BODY.replace(b"abc", content))
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    response = client.post(
        "/v1/files",
        input_stream=body,
        headers={"Content-Length": str(len(body.getvalue()))},
        content_type="multipart/form-data; boundary=b",
    )
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert response.get_json()["bytes"] == len(content)
    assert peak < 2_000_000


def test_expired_files_are_gone(client, app):
    store = app.extensions["store"]
    blob, nbytes = store.blobs.put(io.BytesIO(b"abc"))
    row = store.write(
        lambda session: add_file(
            session, blob, nbytes, filename="a", purpose="batch", lifetime_s=-1
        )
    )
    assert client.get("/v1/files").get_json()["data"] == []
    assert client.get(f"/v1/files/{row.id}").status_code == 404
    assert blobs(app) == []


def test_blobs_without_a_row_are_swept_at_start(store_settings):
    store = Store(ServerConfig(**store_settings))
    kept, nbytes = store.blobs.put(io.BytesIO(b"abc"))
    store.write(lambda s: add_file(s, kept, nbytes, filename="a", purpose="batch"))
    store.blobs.put(io.BytesIO(b"lost"))
    sweep_blobs(store)
    assert list(store.blobs.ids()) == [kept]
    store.close()


class Stalled(io.RawIOBase):
    """A body whose client has stopped sending."""

    def __init__(self, begun, gate):
        self._begun, self._gate = begun, gate

    def readable(self):
        return True

    def readinto(self, buffer):
        self._begun.release()
        self._gate.wait(PATIENCE_S)
        return 0


def test_stalled_uploads_leave_threads_to_others(app, client):
    begun, gate = threading.Semaphore(0), threading.Event()
    statuses = []

    def stall():
        response = app.test_client().post(
            "/v1/files",
            environ_overrides={"wsgi.input": Stalled(begun, gate), "CONTENT_LENGTH": "1000000"},
            content_type="multipart/form-data; boundary=b",
        )
        statuses.append(response.status_code)

    threads = [threading.Thread(target=stall) for _ in range(MOST_UPLOADS)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=PATIENCE_S)
    refused = upload(client)
    assert refused.status_code == 503 and refused.headers["Retry-After"]
    gate.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert statuses == [400] * MOST_UPLOADS
    assert upload(client).status_code == 200


def test_a_body_that_trickles_is_ended():
    ours, theirs = socket.socketpair()
    with ours, theirs, _time_limit(ours, 0.05):
        theirs.send(b"x")
        assert ours.recv(10) == b"x"
        assert ours.recv(10) == b""
