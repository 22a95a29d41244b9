"""State, draining and kernels over HTTP. Oracle: the kernel registry."""

import threading

import pytest
import torch

from oxillama_torch.kernels import registry

PROMPT = "import os\n\ndef join("


@pytest.fixture(autouse=True)
def same_rules_afterwards():
    before = registry.active_rules()
    yield
    registry.set_rules(before)


def test_stats_and_health(client, model_id):
    stats = client.get("/admin/stats").get_json()
    assert stats["models"][model_id]["alive"] == 1
    assert stats["active_requests"] == 0
    client.post("/v1/completions", json={"model": model_id, "prompt": "x", "max_tokens": 1})
    assert client.get("/admin/stats").get_json()["requests_total"] == stats["requests_total"] + 1
    assert client.get("/admin/health").get_json()["alive"] == {model_id: True}


def test_draining_refuses_new_work_and_can_be_taken_back(client, model_id):
    assert client.get("/admin/drain").get_json() == {"draining": False, "in_progress": 0}
    assert client.post("/admin/drain").status_code == 202
    refused = client.get("/v1/models")
    assert (refused.status_code, bool(refused.headers["Retry-After"])) == (503, True)
    assert client.get("/health").status_code == 200
    assert client.get("/admin/stats").get_json()["draining"] is True
    assert client.delete("/admin/drain").get_json()["draining"] is False
    assert client.get("/v1/models").status_code == 200


def test_kernels_are_told_with_their_reasons(client, model_id):
    shown = client.get("/admin/kernels").get_json()
    [model] = shown["models"]
    assert model["id"] == model_id
    ops = {choice["op"] for choice in model["kernels"]}
    assert ops == set(registry.registered_ops())
    for op in ("rms_norm", "attention"):
        kernel, _ = registry.explain(op, registry.Call("cpu", torch.float32, model["numerics"]))
        first = next(choice for choice in model["kernels"] if choice["op"] == op)
        assert first["backend"] == kernel.backend
        assert "best that can serve" in first["reason"]


def test_kernels_are_switched_between_steps(client, model_id):
    """Streams that run meanwhile lose nothing; what cannot serve is refused and changes nothing."""
    body = {"model": model_id, "prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
    answers = []

    def complete():
        mine = client.application.test_client()
        answers.append(mine.post("/v1/completions", json=body).get_json())

    before = client.get("/admin/kernels").get_json()
    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    spec = "quant_matmul=reference,attention=reference"
    shown = client.put("/admin/kernels", json={"kernels": spec}).get_json()
    for thread in threads:
        thread.join()
    assert [a["usage"]["completion_tokens"] for a in answers] == [100] * 4
    assert shown["rules"] == spec
    served = {(c["op"], c["backend"]) for c in shown["models"][0]["kernels"]}
    assert ("quant_matmul", "reference") in served
    changed = shown["models"][0]["system_fingerprint"]
    assert changed != before["models"][0]["system_fingerprint"]
    answer = client.post("/v1/completions", json={**body, "max_tokens": 1}).get_json()
    assert answer["system_fingerprint"] == changed
    back = client.put("/admin/kernels", json={"kernels": before["rules"]}).get_json()
    assert back == before


@pytest.mark.parametrize(
    "spec", ["nope=x", "attention=nope", "quant_matmul", "quant_matmul.zz=reference"]
)
def test_unknown_kernels_are_refused_by_name(client, spec):
    response = client.put("/admin/kernels", json={"kernels": spec})
    assert response.status_code == 400
    error = response.get_json()["error"]
    assert (error["param"], error["code"]) == ("kernels", "unsupported_value")


def test_a_kernel_that_cannot_serve_changes_nothing(client, model_id, monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", {op: dict(k) for op, k in registry._KERNELS.items()})
    registry.register("rms_norm", "test.elsewhere", devices=("cuda",))(lambda *a, **k: None)
    before = registry.active_rules()
    response = client.put("/admin/kernels", json={"kernels": "rms_norm=test.elsewhere"})
    assert response.status_code == 400
    assert "runs on cuda" in response.get_json()["error"]["message"]
    assert registry.active_rules() == before
    answer = client.post("/v1/completions", json={"model": model_id, "prompt": "x"})
    assert answer.status_code == 200
