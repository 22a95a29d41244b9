"""Adapters over HTTP. Oracle: the library with the same adapter; peft's own file format.

The adapters are random peft folders for the demo model, written by hand.
"""

import json

import pytest
import torch
from demo_adapters import RANK, write_adapter
from safetensors.torch import load_file, save_file

from oxillama_torch.config import ServerConfig
from oxillama_torch.llm import LLM
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.app import close_app, create_app

PROMPT = "import os\n\ndef join("


@pytest.fixture
def root(tmp_path, llm):
    root = tmp_path / "adapters"
    for seed, name in enumerate(("red", "blue")):
        write_adapter(root / name, seed)
    yield root
    for name in llm.adapters:
        llm.unload_adapter(name)


@pytest.fixture
def app(make_app, root):
    return make_app(adapter_root=root, loras=(f"red={root / 'red'}", f"blue={root / 'blue'}"))


@pytest.fixture
def client(app):
    return app.test_client()


def _text(client, model, **fields):
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": 12, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.get_json()
    return response.get_json()["choices"][0]["text"]


def test_adapters_are_models_with_a_parent(client, model_id):
    models = {m["id"]: m for m in client.get("/v1/models").get_json()["data"]}
    assert set(models) == {model_id, "red", "blue"}
    assert models["red"]["parent"] == model_id
    assert client.get("/v1/models/blue").get_json()["id"] == "blue"


def test_every_way_of_naming_one_is_the_librarys(client, model_id, llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = llm.generate(PROMPT, params, adapters=[("red", 1.0)])[0].text
    assert _text(client, "red") == expected
    assert _text(client, model_id, lora="red") == expected
    assert _text(client, model_id, lora=[{"name": "red"}]) == expected
    assert _text(client, model_id) == llm.generate(PROMPT, params)[0].text != expected


def test_two_adapters_with_scales(client, model_id, llm):
    params = SamplingParams(temperature=0, max_tokens=12)
    pair = [{"name": "red", "scale": 0.7}, {"name": "blue", "scale": -0.4}]
    expected = llm.generate(PROMPT, params, adapters=[("red", 0.7), ("blue", -0.4)])[0].text
    assert _text(client, model_id, lora=pair) == expected
    assert _text(client, "red", lora=[{"name": "blue", "scale": 0.0}]) == _text(client, "red")


@pytest.mark.parametrize(
    ("lora", "status"),
    [("green", 404), ([{"name": "red", "scale": "1"}], 400), ([{"scale": 1}], 400), (5, 400)],
    ids=["unknown", "string-scale", "no-name", "number"],
)
def test_bad_adapters_are_refused(client, model_id, lora, status):
    body = {"model": model_id, "prompt": PROMPT, "lora": lora}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == status
    if status == 404:
        assert "blue" in response.get_json()["error"]["message"]


def test_load_replace_and_drop(client, root, llm):
    write_adapter(root / "other", 9)
    before = _text(client, "red")
    loaded = client.post("/admin/loras", json={"name": "red", "path": "other"})
    assert loaded.status_code == 201
    assert loaded.get_json()["ranks"] == [RANK]
    assert _text(client, "red") != before
    names = [item["name"] for item in client.get("/admin/loras").get_json()["data"]]
    assert names == ["blue", "red"]
    assert client.delete("/admin/loras/red").get_json()["deleted"]
    assert client.delete("/admin/loras/red").status_code == 404
    body = {"model": "red", "prompt": PROMPT}
    assert client.post("/v1/completions", json=body).status_code == 404


@pytest.mark.parametrize("scale", ["1e999", "NaN", "-Infinity"])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_scales_that_are_not_finite_are_refused(client, model_id, route, scale):
    asks = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    key = "messages" if route.startswith("chat") else "prompt"
    body = {"model": model_id, key: asks[key], "lora": [{"name": "red", "scale": 0}]}
    text = json.dumps(body).replace('"scale": 0', f'"scale": {scale}')
    response = client.post(f"/v1/{route}", data=text, content_type="application/json")
    assert response.status_code == 400, response.get_json()


def test_an_unknown_one_is_named_with_those_there_are(client, model_id):
    body = {"model": model_id, "prompt": "x", "lora": "green"}
    error = client.post("/v1/completions", json=body).get_json()["error"]
    assert (error["code"], error["param"]) == ("adapter_not_found", "lora")
    assert "'green'" in error["message"] and "blue, red" in error["message"]
    response = client.post("/v1/completions", json={"model": "green", "prompt": "x"})
    assert (response.status_code, response.get_json()["error"]["code"]) == (404, "model_not_found")


def test_an_adapter_of_another_model_is_refused_with_both_shapes(client, root, llm):
    """A base of another width; and factors whose ranks differ."""
    write_adapter(root / "wide", 3, hidden=320)
    response = client.post("/admin/loras", json={"name": "x", "path": "wide"})
    error = response.get_json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_adapter")
    assert "(320, 4)" in error["message"] and "(256, 768)" in error["message"]
    write_adapter(root / "odd", 3)
    tensors = load_file(root / "odd" / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("gate_proj.lora_B.weight"))
    tensors[key] = torch.zeros(768, RANK + 1)
    save_file(tensors, root / "odd" / "adapter_model.safetensors")
    response = client.post("/admin/loras", json={"name": "x", "path": "odd"})
    error = response.get_json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_adapter")
    assert "(768, 5)" in error["message"] and "(768, 4)" in error["message"]


def test_listing_neither_reads_nor_uses_adapters(tmp_path):
    """Beyond the budget, the one used longest ago is put away; listing changes nothing of that."""
    root = tmp_path / "adapters"
    for seed, name in enumerate("abc"):
        write_adapter(root / name, seed)
    options = {"device": "cpu", "kv_pages": 16, "max_context": 64}
    with LLM(**options) as free:
        free.load_adapter("a", root / "a")
        size = free.engine.adapters.facts()[0].nbytes
    with LLM(adapter_memory_bytes=2 * size, **options) as llm:
        app = create_app(ServerConfig(adapter_root=root), llm)
        try:
            client = app.test_client()
            for name in "abc":
                body = {"name": name, "path": name, "pinned": name == "c"}
                loaded = client.post("/admin/loras", json=body)
                assert loaded.status_code == 201 and loaded.get_json()["resident"]
            for _ in range(2):
                data = client.get("/admin/loras").get_json()["data"]
                assert [(i["id"], i["resident"], i["pinned"]) for i in data] == [
                    ("a", False, False), ("b", True, False), ("c", True, True),
                ]  # fmt: skip
            assert _text(client, "a")  # read again; "b" makes room
            data = client.get("/admin/loras").get_json()["data"]
            assert [item["resident"] for item in data] == [True, False, True]
            write_adapter(root / "b2", 9)
            (root / "b2" / "adapter_model.safetensors").replace(
                root / "b" / "adapter_model.safetensors"
            )
            response = client.post("/v1/completions", json={"model": "b", "prompt": "x"})
            assert response.status_code == 400
            assert response.get_json()["error"]["code"] == "adapter_changed"
            body = {"name": "d", "path": "a", "pinned": True}
            assert client.post("/admin/loras", json=body).status_code == 201
            full = client.post("/admin/loras", json={**body, "name": "e"})
            assert full.status_code == 429 and "pinned" in full.get_json()["error"]["message"]
        finally:
            close_app(app)


@pytest.mark.parametrize(
    ("path", "status"),
    [("../outside", 403), ("/etc", 403), ("link", 403), ("absent", 404), ("", 400)],
)
def test_paths_stay_inside_the_root(client, root, llm, path, status):
    write_adapter(root.parent / "outside", 3)
    (root / "link").symlink_to(root.parent / "outside")
    response = client.post("/admin/loras", json={"name": "x", "path": path})
    assert response.status_code == status, response.get_json()
    assert set(response.get_json()["error"]) == {"message", "type", "param", "code"}


def test_without_a_root_nothing_is_loaded_over_http(make_app, root):
    client = make_app().test_client()
    response = client.post("/admin/loras", json={"name": "x", "path": str(root / "red")})
    assert response.status_code == 403


def test_administration_has_its_own_token(make_app):
    open_client = make_app(api_keys=("user",)).test_client()
    assert open_client.get("/admin/loras").status_code == 200
    forwarded = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    remote = {"REMOTE_ADDR": "192.0.2.1"}
    answer = open_client.get("/admin/loras", headers=forwarded, environ_overrides=remote)
    assert answer.status_code == 403
    client = make_app(api_keys=("user",), admin_token="root").test_client()
    for token, status in (("user", 401), ("", 401), ("root", 200)):
        headers = {"Authorization": f"Bearer {token}"}
        found = client.get("/admin/loras", headers=headers, environ_overrides=remote)
        assert found.status_code == status
    headers = {"Authorization": "Bearer root"}
    assert client.get("/v1/models", headers=headers).status_code == 401
