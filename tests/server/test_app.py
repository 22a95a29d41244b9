"""Envelope, headers, limits, authentication and the unprefixed routes. Oracle: server-api facts."""

import itertools
import threading

import pytest

from oxillama_torch.errors import CapacityError, EngineError
from oxillama_torch.server.access import PUBLIC_PATHS
from oxillama_torch.server.errors import envelope


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("PUT", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405)],
)
def test_every_error_has_the_envelope(client, method, path, status):
    response = client.open(path, method=method)
    assert response.status_code == status
    assert set(response.get_json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


def test_wrong_routes_are_told_what_there_is(client):
    missing = client.post("/infill").get_json()["error"]["message"]
    assert missing == "There is no POST /infill; GET /docs lists the routes."
    wrong = client.put("/v1/chat/completions").get_json()["error"]["message"]
    assert wrong == "/v1/chat/completions takes GET, POST, not PUT."


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"[" * 100_000, b'{"a": NaN}', b'{"a": 1e999}', b"\xff\xfe"],
    ids=["empty", "cut", "array", "string", "deep", "nan", "huge", "not-utf8"],
)
def test_malformed_json_is_400(client, body):
    response = client.post("/v1/chat/completions", data=body, content_type="application/json")
    assert response.status_code == 400
    assert response.get_json()["error"]["type"] == "invalid_request_error"


def test_long_body_is_413(make_app):
    client = make_app(max_body_bytes=1000).test_client()
    response = client.post("/v1/completions", json={"model": "x", "prompt": "y" * 2000})
    assert response.status_code == 413
    assert response.get_json()["error"]["code"] == "request_too_large"


def test_request_id_is_echoed_when_valid(client):
    assert client.get("/health", headers={"X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
    bad = client.get("/health", headers={"X-Request-Id": "a b"}).headers["x-request-id"]
    assert bad != "a b"
    assert len(bad) == 32


def test_keys_guard_everything_but_health(make_app):
    app = make_app(api_keys=("one", "two"))
    client = app.test_client()
    guessers = itertools.cycle(range(1, 255))
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<path:model_id>", "m")
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Bearer "}):
                # From an address of its own: each may guess only so often.
                peer = {"REMOTE_ADDR": f"10.0.0.{next(guessers)}"}
                response = client.open(path, method=method, headers=headers, environ_overrides=peer)
                status = response.status_code
                # Administration has a token of its own: see test_loras.py.
                open_path = path in PUBLIC_PATHS or path.startswith("/admin/")
                assert (status == 401) != open_path, path
    assert client.get("/v1/models", headers={"Authorization": "Bearer two"}).status_code == 200
    assert client.get("/v1/models", headers={"X-Api-Key": "one"}).status_code == 200


def test_unexpected_errors_tell_nothing():
    assert envelope(ValueError("/secret/path"))["error"]["message"] == "internal error"


def test_full_inbox_is_429_with_retry_after(client, model_id, llm, monkeypatch):
    def full(request, outbox=None):
        raise CapacityError("too many requests waiting", retry_after_s=2.3)

    monkeypatch.setattr(llm.engine, "submit", full)
    response = client.post("/v1/completions", json={"model": model_id, "prompt": "x"})
    assert response.status_code == 429
    assert response.headers["Retry-After"] == "3"
    assert response.get_json()["error"]["code"] == "rate_limit_exceeded"


def test_dead_engine_is_503(client, model_id, llm, monkeypatch):
    def dead(request, outbox=None):
        raise EngineError("the engine has stopped")

    monkeypatch.setattr(llm.engine, "submit", dead)
    response = client.post("/v1/completions", json={"model": model_id, "prompt": "x"})
    assert response.status_code == 503
    assert response.headers["Retry-After"]


def test_models(client, model_id):
    assert client.get(f"/v1/models/{model_id}").get_json()["object"] == "model"
    assert client.get("/v1/models/a/b").status_code == 404


def test_tokenize_in_both_dialects(client, llm):
    ids = llm.tokenize("import os")
    assert client.post("/tokenize", json={"content": "import os"}).get_json() == {"tokens": ids}
    other = client.post("/tokenize", json={"prompt": "import os"}).get_json()
    assert (other["tokens"], other["count"]) == (ids, len(ids))
    assert other["max_model_len"] == llm.engine.max_context
    messages = [{"role": "user", "content": "hi"}]
    rendered = client.post("/tokenize", json={"messages": messages}).get_json()["tokens"]
    assert rendered == llm.chat_ids(messages)


def test_pieces_show_bytes_that_are_no_text(client):
    pieces = client.post("/tokenize", json={"content": "a☃", "with_pieces": True}).get_json()[
        "tokens"
    ]
    data = b"".join(
        p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces
    )
    assert data.decode() == "a☃"


def test_detokenize_round_trip(client, llm):
    text = "def f(x):\n\treturn 'ä☃'\n"
    assert client.post("/detokenize", json={"tokens": llm.tokenize(text)}).get_json() == {
        "content": text,
        "prompt": text,
    }
    assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_32_streams_share_the_engine_fairly(client, model_id, make_app):
    """None starves, none loses or repeats a token: each equals the same request alone."""
    app = make_app()

    def text(index):
        body = {
            "model": model_id,
            "prompt": f"# {index}\nimport ",
            "max_tokens": 24,
            "ignore_eos": True,
            "temperature": 1,
            "seed": index,
        }
        answer = app.test_client().post("/v1/completions", json=body).get_json()
        assert answer["usage"]["completion_tokens"] == 24
        return answer["choices"][0]["text"]

    together = {}
    threads = [
        threading.Thread(target=lambda i=i: together.__setitem__(i, text(i))) for i in range(32)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 7, 31):
        assert together[index] == text(index)
    assert len(together) == 32
