"""Keys, web tokens, limits and origins. Oracles: PyJWT as issuer, OpenAI's shapes, a set clock."""

import base64
import datetime
import hashlib
import hmac
import importlib
import io
import json
import os
import threading

import jwt
import openai
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from waiting import until

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.server.keys import KeyRing
from oxillama_torch.server.limits import Allowance, Limiter, Limits, RateLimited

SECRET = "s" * 64

# The SDK has changed its HTTP library with its third version.
httpx = importlib.import_module("httpx2" if openai.__version__ >= "3" else "httpx")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


# Keys


def test_keys_of_a_file_change_without_restart(tmp_path, make_app):
    path = tmp_path / "keys"
    digest = hashlib.sha256(b"hashed").hexdigest()
    path.write_text(f"# staff\n\nfirst\nsha256:{digest} requests=5\n")
    client = make_app(api_key_file=path, api_keys=("fixed",)).test_client()

    def status(token):
        return client.get("/v1/models", headers=bearer(token)).status_code

    assert [status(t) for t in ("first", "hashed", "fixed", "other", f"sha256:{digest}")] == [
        200, 200, 200, 401, 401,
    ]  # fmt: skip
    assert client.get("/v1/models", headers={"X-Api-Key": "first"}).status_code == 200
    refused = client.get("/v1/models")
    assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert refused.get_json()["error"]["code"] == "invalid_api_key"


def test_a_key_file_is_read_again_and_a_broken_one_changes_nothing(tmp_path):
    path, clock = tmp_path / "keys", Clock()
    path.write_text("one\n")
    ring = KeyRing((), path, clock)

    def rewrite(text):
        new = tmp_path / "new"
        new.write_bytes(text)
        os.replace(new, path)
        clock.now += 5

    assert ring.find("one")
    rewrite(b"two tokens=10")
    assert not ring.find("one")
    assert ring.find("two").limits == Limits(None, 10)
    for broken in (b"three limit=4", b"\xff\xfe", b"three tokens=0"):
        rewrite(broken)
        assert ring.find("two")
        assert not ring.find("three")
    path.unlink()
    clock.now += 5
    assert ring.find("two")
    rewrite(b"")
    assert not ring.find("two")
    assert ring.in_use  # an empty file lets nobody in


@pytest.mark.parametrize("text", [None, b"a b", b"a tokens=-1", b"a tokens=1 tokens=2"])
def test_an_unsound_key_file_ends_the_start(tmp_path, make_app, text):
    path = tmp_path / "keys"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UnsupportedError, match="key file"):
        make_app(api_key_file=path)


# Web tokens


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(SECRET + "\n")
    return path


def issue(key=SECRET, algorithm="HS256", scope="chat:read chat:write", seconds=300, **claims):
    now = datetime.datetime.now(datetime.timezone.utc)
    claims = {"exp": now + datetime.timedelta(seconds=seconds), "scope": scope, **claims}
    return jwt.encode({k: v for k, v in claims.items() if v is not None}, key, algorithm)


def test_scopes_decide_what_a_token_may(make_app, secret_file, model_id):
    client = make_app(jwt_key=secret_file, admin_token="root").test_client()
    body = {"model": model_id, "prompt": "x", "max_tokens": 1}

    def statuses(scope):
        headers = bearer(issue(scope=scope))
        return [
            client.get("/v1/models", headers=headers).status_code,
            client.post("/v1/completions", headers=headers, json=body).status_code,
            client.post("/v1/embeddings", headers=headers, json={"model": model_id, "input": "x"})
            .status_code,
            client.get("/admin/models", headers=headers).status_code,
            client.put("/admin/kernels", headers=headers, json={"kernels": ""}).status_code,
        ]  # fmt: skip

    assert statuses("chat:read") == [200, 403, 403, 403, 403]
    assert statuses("chat:write") == [403, 200, 403, 403, 403]
    assert statuses("embed:read") == [403, 403, 200, 403, 403]
    assert statuses("admin:read") == [403, 403, 403, 200, 403]
    assert statuses("admin:write") == [403, 403, 403, 403, 200]
    assert client.get("/admin/models", headers=bearer("root")).status_code == 200
    assert client.get("/v1/models", headers=bearer("root")).status_code == 401
    refused = client.get("/v1/models", headers=bearer(issue(scope=""))).get_json()["error"]
    assert (refused["code"], refused["type"]) == ("insufficient_scope", "permission_error")
    listed = issue(scope=None, scopes=["chat:read"])
    assert client.get("/v1/models", headers=bearer(listed)).status_code == 200


def test_work_for_later_has_the_scopes_of_its_caller(make_app, secret_file, monkeypatch):
    """A batch is no way round: neither when it is made, nor when its lines are run."""
    client = make_app(jwt_key=secret_file).test_client()
    writer = bearer(issue(scope="chat:write chat:read"))
    both = bearer(issue(scope="chat:write chat:read embed:read"))
    line = json.dumps({"custom_id": "a", "body": {"model": "x", "input": "y"}})
    file = {"file": (io.BytesIO(line.encode()), "in.jsonl"), "purpose": "batch"}
    file_id = client.post("/v1/files", data=file, headers=writer).get_json()["id"]
    batch = {"input_file_id": file_id, "completion_window": "24h", "endpoint": "/v1/embeddings"}
    jobs = {"input_jsonl": line, "endpoint": "/v1/embeddings"}
    for path, body in (("/v1/batches", batch), ("/v1/batch_jobs", jobs)):
        refused = client.post(path, json=body, headers=writer)
        assert refused.status_code == 403, refused.get_json()
        assert refused.get_json()["error"]["code"] == "insufficient_scope"
        assert client.post(path, json=body, headers=both).status_code in (200, 202)
    # As if it had been made before its route was known to need another scope.
    monkeypatch.setattr("oxillama_torch.server.openai.batches.check_reach", lambda path: None)
    made = client.post("/v1/batches", json=batch, headers=writer).get_json()
    ended = until(
        lambda: b if (b := client.get(f"/v1/batches/{made['id']}", headers=writer).get_json())
        ["status"] == "completed" else None,
        "the batch does not end",
    )  # fmt: skip
    errors = client.get(f"/v1/files/{ended['error_file_id']}/content", headers=writer).get_data()
    assert json.loads(errors)["response"]["status_code"] == 403


def test_expired_tokens_are_no_guesses(make_app, secret_file):
    client = make_app(jwt_key=secret_file).test_client()
    old = bearer(issue(seconds=-300))
    assert {client.get("/v1/models", headers=old).status_code for _ in range(50)} == {401}
    wrong = bearer(issue(key="z" * 64))
    assert {client.get("/v1/models", headers=wrong).status_code for _ in range(50)} == {401, 429}


def test_tokens_that_must_not_pass(make_app, secret_file):
    client = make_app(jwt_key=secret_file, jwt_audience="me", jwt_issuer="you").test_client()
    good = {"aud": "me", "iss": "you"}

    def status(token):
        return client.get("/v1/models", headers=bearer(token)).status_code

    now = datetime.datetime.now(datetime.timezone.utc)
    later = now + datetime.timedelta(seconds=200)
    assert status(issue(**good)) == 200
    assert status(issue(seconds=-30, **good)) == 200  # within the skew
    assert status(issue(nbf=now + datetime.timedelta(seconds=30), **good)) == 200
    head, claims, signature = issue(**good).split(".")
    none = jwt.encode({**good, "exp": later, "scope": "chat:read"}, None, "none")
    for token in (
        issue(seconds=-90, **good), issue(nbf=later, **good), issue(aud="other", iss="you"),
        issue(aud="me", iss="other"), issue(iss="you"), issue(aud="me"),
        issue(key="t" * 64, **good),
        issue(algorithm="HS512", **good), none, f"{head}.{claims}.", f"{head}.{claims}.AAAA",
        "a.b.c", "..", "", jwt.encode({**good, "scope": "chat:read"}, SECRET, "HS256"),
    ):  # fmt: skip
        assert status(token) == 401, token


def test_public_keys_are_never_secrets(tmp_path, make_app):
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path = tmp_path / "key.pem"
    path.write_bytes(pem)
    client = make_app(jwt_key=path).test_client()
    token = issue(private, "RS256")
    assert client.get("/v1/models", headers=bearer(token)).status_code == 200
    # The classic attack: the public key's bytes as the secret of an HMAC.
    parts = [b'{"alg":"HS256","typ":"JWT"}', b'{"exp":99999999999,"scope":"chat:read"}']
    signed = b".".join(base64.urlsafe_b64encode(p).rstrip(b"=") for p in parts)
    for secret in (pem, pem.strip()):
        tag = base64.urlsafe_b64encode(hmac.digest(secret, signed, "sha256")).rstrip(b"=")
        forged = (signed + b"." + tag).decode()
        assert client.get("/v1/models", headers=bearer(forged)).status_code == 401


def test_keys_that_cannot_verify_end_the_start(tmp_path, make_app):
    path = tmp_path / "key"
    for content in (b"short", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
                    b"-----BEGIN RSA PRIVATE KEY-----\n"):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UnsupportedError, match="JWT key"):
            make_app(jwt_key=path)
    with pytest.raises(UnsupportedError, match="No such file"):
        make_app(jwt_key=tmp_path / "none")


# Limits


def test_a_bucket_gives_a_minutes_worth_and_fills_again():
    clock = Clock()
    allowance = Allowance(Limits(requests=60, tokens=None), clock)
    for _ in range(60):
        allowance.admit()
    with pytest.raises(RateLimited) as refused:
        allowance.admit()
    assert refused.value.status == 429
    assert refused.value.retry_after_s == pytest.approx(1)
    clock.now -= 3600  # a clock that jumps back takes nothing and gives nothing
    with pytest.raises(RateLimited):
        allowance.admit()
    clock.now += 3600 + 2
    allowance.admit()
    allowance.admit()
    with pytest.raises(RateLimited):
        allowance.admit()


def test_tokens_are_a_debt_that_is_paid_off():
    clock = Clock()
    allowance = Allowance(Limits(None, tokens=600), clock)
    allowance.admit()
    allowance.charge(1000)
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as refused:
        allowance.admit()
    assert refused.value.type == "tokens"
    clock.now += refused.value.retry_after_s + 0.01
    allowance.admit()
    clock.now += 120
    assert allowance.headers() == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "0ms",
    }


def test_threads_take_no_more_than_there_is():
    allowance = Allowance(Limits(requests=100), Clock())
    passed = []

    def take():
        for _ in range(50):
            try:
                allowance.admit()
                passed.append(1)
            except RateLimited:
                pass

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 100


def test_holders_are_not_remembered_without_bound():
    limiter = Limiter(Limits(requests=1), Clock())
    for index in range(20_000):
        limiter.allowance(f"ip:{index}").admit()
    assert len(limiter._held) == 10_000


def test_limits_over_http(make_app, tmp_path, model_id):
    path = tmp_path / "keys"
    path.write_text("slow requests=2\nfast requests=100 tokens=30\n")
    client = make_app(api_key_file=path, requests_per_minute=1).test_client()
    answers = [client.get("/v1/models", headers=bearer("slow")) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
    error = answers[2].get_json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    body = {"model": model_id, "prompt": "x", "max_tokens": 40, "ignore_eos": True}
    for stream in (True, False):
        answer = client.post(
            "/v1/completions", json={**body, "stream": stream}, headers=bearer("fast")
        )
        answer.get_data()
        answer.close()
        assert answer.status_code == (200 if stream else 429)
    assert answer.get_json()["error"]["type"] == "tokens"
    # Guesses are counted too; being asked how one is, is free.
    guesses = [client.get("/v1/models", headers=bearer("no")).status_code for _ in range(2)]
    assert guesses == [401, 429]
    assert {client.get("/metrics", headers=bearer("slow")).status_code for _ in range(5)} == {200}
    assert client.get("/health").status_code == 200


def test_without_limits_there_are_no_headers(client):
    assert not [k for k, _ in client.get("/v1/models").headers if k.lower().startswith("x-rate")]


# Origins


def test_origins_are_off_unless_listed(make_app, client):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for method in ("GET", "OPTIONS"):
        answer = client.open("/v1/models", method=method, headers=ask)
        assert not [k for k, _ in answer.headers if k.startswith("Access-Control")]
    listed = make_app(cors_origins=("https://a.example",), api_keys=("k",)).test_client()
    preflight = listed.options("/v1/chat/completions", headers=ask)
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]
    refused = listed.get("/v1/models", headers=ask)
    assert refused.status_code == 401  # readable for the page all the same
    assert refused.headers["Access-Control-Allow-Origin"] == "https://a.example"
    other = listed.options("/v1/models", headers={**ask, "Origin": "https://b.example"})
    assert "Access-Control-Allow-Origin" not in other.headers
    assert other.headers["Vary"] == "Origin"


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 202), ({"Origin": "http://localhost"}, 202), ({"Origin": "https://evil.example"}, 403),
     ({"Origin": "null"}, 403), ({"Host": "evil.example"}, 403), ({"Host": "127.0.0.1:80"}, 202),
     ({"Host": "[::1]:8080"}, 202), ({"X-Forwarded-For": "127.0.0.1"}, 202)],
)  # fmt: skip
def test_a_page_in_a_browser_is_no_administrator(client, headers, status):
    assert client.post("/admin/drain", headers=headers).status_code == status
    remote = {"REMOTE_ADDR": "192.0.2.1"}
    assert client.post("/admin/drain", headers=headers, environ_base=remote).status_code == 403


# What the SDK makes of it


def test_the_sdk_raises_its_own_classes(make_app, tmp_path, secret_file):
    keys = tmp_path / "keys"
    keys.write_text("good\nkey.with.dots\nslow requests=1\n")
    app = make_app(api_key_file=keys, jwt_key=secret_file)

    def client(key):
        transport = httpx.WSGITransport(app=app)
        http = openai.DefaultHttpxClient(transport=transport)
        return openai.OpenAI(base_url="http://x/v1", api_key=key, max_retries=0, http_client=http)

    with client("good") as sdk:
        assert sdk.models.list().data
        with pytest.raises(openai.NotFoundError) as error:
            sdk.models.retrieve("nope")
        assert error.value.code == "model_not_found"
    with client("key.with.dots") as sdk:
        assert sdk.models.list().data
    with client("bad") as sdk, pytest.raises(openai.AuthenticationError) as error:
        sdk.models.list()
    assert error.value.code == "invalid_api_key"
    with client(issue(scope="chat:write")) as sdk, pytest.raises(openai.PermissionDeniedError):
        sdk.models.list()
    with client("slow") as sdk:
        sdk.models.list()
        with pytest.raises(openai.RateLimitError) as error:
            sdk.models.list()
    assert (error.value.code, error.value.type) == ("rate_limit_exceeded", "requests")
    assert int(error.value.response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 400), ({"Origin": "http://localhost"}, 400), ({"Origin": "https://evil.example"}, 403),
     ({"Origin": "null"}, 403)],
)  # fmt: skip
def test_pages_cannot_send_forms_to_a_server_without_keys(client, headers, status):
    # A browser sends these without asking first: a form, and a body of no type.
    form = {"data": b"x", "content_type": "multipart/form-data; boundary=b"}
    assert client.post("/v1/files", headers=headers, **form).status_code == status
    assert client.post("/v1/completions", headers=headers, data=b"{}").status_code == status
