"""Several models behind one server. Oracle: the same files through the library."""

import shutil
import threading

import pytest
from waiting import PATIENCE_S, until

from oxillama_torch.config import ServerConfig, demo_model_path
from oxillama_torch.errors import CapacityError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.app import close_app, create_app
from oxillama_torch.server.pool import Services
from oxillama_torch.server.service import Service

PROMPT = "import os\n\ndef join("


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "models"
    root.mkdir()
    for name in ("a.gguf", "b.gguf", "c.gguf"):
        (root / name).symlink_to(demo_model_path())
    # A link that leaves the folder is judged by where it leads.
    shutil.copyfile(demo_model_path(), root / "real.gguf")
    (root / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    return root


def wait_ready(client, name):
    def loaded():
        models = {m["id"]: m for m in client.get("/admin/models").get_json()["data"]}
        return models[name] if models[name]["status"] != "loading" else None

    return until(loaded, "the model is not loaded")


def load(client, name, path="real.gguf"):
    response = client.post("/admin/models/load", json={"id": name, "path": path})
    assert response.status_code == 202, response.get_json()
    model = wait_ready(client, name)
    assert model["status"] == "ready", model
    return model


def complete(client, model, **fields):
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 8, **fields}
    return client.post("/v1/completions", json=body)


def test_requests_reach_the_model_they_name(make_app, root, llm, model_id):
    client = make_app(model_root=root).test_client()
    started = client.post("/admin/models/load", json={"id": "two", "path": "real.gguf"})
    assert started.status_code == 202
    assert started.get_json()["status"] == "loading"
    busy = complete(client, "two")
    assert (busy.status_code, busy.get_json()["error"]["code"]) in (
        (503, "model_loading"),
        (200, None),
    )
    if busy.status_code == 503:
        assert int(busy.headers["Retry-After"]) >= 1
    assert wait_ready(client, "two")["status"] == "ready"
    expected = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))[0].text
    for name in ("two", model_id):
        answer = complete(client, name).get_json()
        assert answer["model"] == name
        assert answer["choices"][0]["text"] == expected
    assert {m["id"] for m in client.get("/v1/models").get_json()["data"]} == {"two", model_id}
    assert client.get("/v1/models/two").get_json()["id"] == "two"
    assert client.post("/admin/models/unload", json={"id": "two"}).status_code == 200
    gone = complete(client, "two")
    assert (gone.status_code, gone.get_json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "status"),
    [("../x.gguf", 403), ("/etc/passwd", 403), ("none.gguf", 404), ("bad.gguf", 400),
     (".", 400), ("a\0b", 400), ("a.gguf", 403)],
)  # fmt: skip
def test_only_sound_files_of_the_root_are_loaded(make_app, root, path, status):
    client = make_app(model_root=root).test_client()
    response = client.post("/admin/models/load", json={"id": "x", "path": path})
    assert response.status_code == status, response.get_json()
    error = response.get_json()["error"]
    assert error["param"] == "path"
    assert str(root) not in error["message"]
    assert len(client.get("/admin/models").get_json()["data"]) == 1


def test_without_a_root_nothing_is_loaded(client):
    response = client.post("/admin/models/load", json={"id": "x", "path": "a.gguf"})
    assert response.status_code == 403


def test_the_least_used_model_makes_room_and_comes_back(make_app, root):
    client = make_app(model_root=root, max_models=3).test_client()
    load(client, "two")
    load(client, "three")
    assert complete(client, "two").status_code == 200  # now "three" is the one used longest ago
    load(client, "four")
    status = {m["id"]: m["status"] for m in client.get("/admin/models").get_json()["data"]}
    assert status["three"] == "unloaded"
    assert status["two"] == "ready"
    again = complete(client, "three")
    assert again.status_code == 503
    assert wait_ready(client, "three")["status"] == "ready"
    assert complete(client, "three").status_code == 200


def test_a_model_in_use_is_never_put_away(make_app, root):
    app = make_app(model_root=root, max_models=2)
    client = app.test_client()
    load(client, "two")
    services = app.extensions["services"]
    with services.lease("two"):
        full = client.post("/admin/models/load", json={"id": "three", "path": "real.gguf"})
        assert (full.status_code, full.get_json()["error"]["code"]) == (503, "no_room")
        # A failed attempt leaves nothing behind.
        assert complete(client, "three").status_code == 404
    load(client, "three")


def test_a_stream_outlives_the_unloading_of_its_model(make_app, root):
    client = make_app(model_root=root).test_client()
    load(client, "two")
    body = {"model": "two", "prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": True}
    response = client.post("/v1/completions", json=body)
    chunks = iter(response.response)
    next(chunks)
    assert client.post("/admin/models/unload", json={"id": "two"}).get_json()["inflight"] >= 0
    text = b"".join(chunks)
    assert b'"finish_reason":"length"' in text
    assert b'data: {"error"' not in text


def test_the_memory_budget_counts_weights_and_pages(make_app, root):
    app = make_app(model_root=root)
    first = app.extensions["services"].describe()[0]["mem_bytes"]
    assert first > demo_model_path().stat().st_size
    client = make_app(model_root=root, model_memory_bytes=first + 1000).test_client()
    full = client.post("/admin/models/load", json={"id": "two", "path": "real.gguf"})
    assert full.status_code == 503
    assert "bytes" in full.get_json()["error"]["message"]


def test_names_are_taken_once(make_app, root, model_id):
    client = make_app(model_root=root).test_client()
    for name in (model_id, ""):
        response = client.post("/admin/models/load", json={"id": name, "path": "real.gguf"})
        assert response.status_code == 400
        assert response.get_json()["error"]["param"] == "id"
    assert client.post("/admin/models/unload", json={"id": model_id}).status_code == 400
    assert client.post("/admin/models/unload", json={"id": "nope"}).status_code == 404


def test_models_given_at_start_are_loaded(llm, root):
    config = ServerConfig(models=(f"two={root / 'real.gguf'}",))
    app = create_app(config, llm)
    try:
        assert wait_ready(app.test_client(), "two")["status"] == "ready"
        assert complete(app.test_client(), "two").status_code == 200
    finally:
        close_app(app)


def test_a_load_that_fails_says_why_and_the_server_can_stop_while_loading(llm, root):
    entered, leave = threading.Event(), threading.Event()

    def open_model(config, progress):
        entered.set()
        assert leave.wait(PATIENCE_S)
        progress(1, 2)
        raise OSError(5, "disk on fire")

    service = Service.from_llm(llm, ServerConfig())
    services = Services(service, ServerConfig(), open_model)
    services.load("two", root / "real.gguf")
    assert entered.wait(PATIENCE_S)
    with pytest.raises(Exception, match="being loaded"):
        services.find("two")
    leave.set()
    until(lambda: services.describe()[1]["status"] != "loading", "loading does not end")
    with pytest.raises(Exception, match="disk on fire"):
        services.find("two")
    leave.clear()
    services.load("two", root / "real.gguf")
    stopper = threading.Thread(target=services.close)
    stopper.start()
    leave.set()
    stopper.join(PATIENCE_S)
    assert not stopper.is_alive()
    assert services.describe()[1]["status"] == "failed"
    with pytest.raises(CapacityError):
        services.load("three", root / "real.gguf")


def test_loading_under_load_with_many_threads(make_app, root, model_id):
    """Whatever the mix of requests, loads and unloads: only the answers that are documented."""
    app = make_app(model_root=root, max_models=2)
    seen, stop = set(), threading.Event()

    def ask():
        mine = app.test_client()
        while not stop.is_set():
            response = complete(mine, "two", max_tokens=2)
            seen.add((response.status_code, (response.get_json().get("error") or {}).get("code")))
            if response.status_code != 200:
                stop.wait(0.01)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    mine = app.test_client()
    try:
        for _ in range(3):
            load(mine, "two")
            assert complete(mine, model_id, max_tokens=1).status_code == 200
            assert mine.post("/admin/models/unload", json={"id": "two"}).status_code == 200
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen <= {(200, None), (404, "model_not_found"), (503, "model_loading")}
