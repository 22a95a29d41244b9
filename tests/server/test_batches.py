"""Batches. Oracles: the openai SDK's models and client; what routes answer to single requests."""

import importlib
import io
import json
import threading
import time

import pytest
from flask.testing import FlaskClient
from openai import BadRequestError, NotFoundError
from openai.types import Batch
from sdk_over_app import sdk_over
from waiting import PATIENCE_S, until

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import CapacityError
from oxillama_torch.llm import LLM
from oxillama_torch.server.app import close_app, create_app
from oxillama_torch.server.batches import runner
from oxillama_torch.server.store.errors import StoreError

CHAT = "/v1/chat/completions"


class Client:
    """A test client that knows batches."""

    def __init__(self, app):
        self.app, self.http = app, app.test_client()
        self.model = self.get("/v1/models")["data"][0]["id"]

    def get(self, path, status=200):
        answer = self.http.get(path)
        assert answer.status_code == status, answer.get_data()
        return answer.get_json()

    def post(self, path, body=None, status=200):
        answer = self.http.post(path, json=body or {})
        assert answer.status_code == status, answer.get_data()
        return answer.get_json()

    def upload(self, lines, purpose="batch"):
        text = b"".join(
            (x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines
        )
        with io.BytesIO(text) as file:
            form = {"purpose": purpose, "file": (file, "in.jsonl")}
            return self.http.post("/v1/files", data=form).get_json()["id"]

    def create(self, lines, endpoint="/v1/completions", **fields):
        body = {"input_file_id": self.upload(lines), "endpoint": endpoint, **fields}
        return self.post("/v1/batches", {"completion_window": "24h", **body})

    def ended(self, batch_id):
        def ended():
            batch = Batch.model_validate(self.get(f"/v1/batches/{batch_id}"), strict=True)
            return (
                batch
                if batch.status not in ("validating", "in_progress", "finalizing", "cancelling")
                else None
            )

        return until(ended, "the batch does not end")

    def lines(self, file_id):
        with self.http.get(f"/v1/files/{file_id}/content") as answer:
            return [json.loads(line) for line in answer.data.splitlines()]

    def line(self, custom_id, url="/v1/completions", **body):
        body = {"model": self.model, "temperature": 0, "max_tokens": 4, **body}
        return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.fixture
def api(make_app):
    return Client(make_app())


def usage_of(batch):
    """Older versions of the SDK have no model for it."""
    return batch.to_dict()["usage"]


def test_answers_are_those_of_single_requests(api):
    lines = [api.line(f"r{i}", prompt=f"import {name}") for i, name in enumerate("abcdefgh")]
    batch = api.create(lines, metadata={"a": "b"})
    assert batch["status"] == "validating"
    done = api.ended(batch["id"])
    assert done.status == "completed" and done.error_file_id is None
    assert (done.request_counts.total, done.request_counts.completed) == (8, 8)
    assert done.metadata == {"a": "b"} and done.model == api.model
    outputs = api.lines(done.output_file_id)
    assert [line["custom_id"] for line in outputs] == [line["custom_id"] for line in lines]
    total = 0
    for line, output in zip(lines, outputs):
        answer = api.post("/v1/completions", line["body"])
        response = output["response"]
        assert output["error"] is None and response["status_code"] == 200 and response["request_id"]
        assert response["body"]["choices"] == answer["choices"]
        total += response["body"]["usage"]["total_tokens"]
    assert usage_of(done)["total_tokens"] == total > 0
    stamps = [done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at]
    assert stamps == sorted(stamps) and done.expires_at == done.created_at + 86400
    file = api.get(f"/v1/files/{done.output_file_id}")
    assert file["purpose"] == "batch_output" and file["filename"].endswith("_output.jsonl")


def test_partial_failure_is_completed(api):
    lines = [
        api.line("good", prompt="x"),
        api.line("bad", prompt="x", temperature=9),
        api.line("unknown", prompt="x", model="other"),
        api.line("also good", prompt="y"),
    ]
    done = api.ended(api.create(lines)["id"])
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 4, 2, 2)
    assert [line["custom_id"] for line in api.lines(done.output_file_id)] == ["good", "also good"]
    bad, unknown = api.lines(done.error_file_id)
    assert bad["response"]["status_code"] == 400 and unknown["response"]["status_code"] == 404
    assert bad["response"]["body"]["error"]["param"] == "temperature"


def test_other_endpoints(api):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [api.line("a", CHAT, **chat)]
    done = api.ended(api.create(lines, CHAT)["id"])
    answer = api.lines(done.output_file_id)[0]["response"]["body"]
    assert answer["object"] == "chat.completion"
    body = {"model": api.model, "input": "hi", "max_output_tokens": 4}
    line = {"custom_id": "r", "method": "POST", "url": "/v1/responses", "body": body}
    done = api.ended(api.create([line], "/v1/responses")["id"])
    answer = api.lines(done.output_file_id)[0]["response"]["body"]
    assert answer["object"] == "response" and usage_of(done)["output_tokens"] > 0
    assert api.get(f"/v1/responses/{answer['id']}")["id"] == answer["id"]
    body = {"model": api.model, "input": ["a", "b"]}
    line = {"custom_id": "e", "method": "POST", "url": "/v1/embeddings", "body": body}
    done = api.ended(api.create([line], "/v1/embeddings")["id"])
    answer = api.lines(done.output_file_id)[0]["response"]["body"]
    assert len(answer["data"]) == 2 and usage_of(done)["output_tokens"] == 0


def test_errors_of_the_file_carry_line_numbers(api):
    good = api.line("a", prompt="x")
    lines = [
        good,
        b"",
        b"{",
        {**good, "custom_id": "b", "url": CHAT},
        {**good, "custom_id": "c", "method": "GET"},
        good,
        b"[]",
        {"custom_id": "d", "method": "POST", "url": "/v1/completions"},
        {**good, "custom_id": ""},
        {**good, "custom_id": 5},
        {**good, "custom_id": "e", "body": {"stream": True}},
        b'{"custom_id": "f", "custom_id": "g", "body": {}}',
        b"\xff",
    ]
    failed = api.ended(api.create(lines)["id"])
    assert failed.status == "failed" and failed.failed_at and failed.output_file_id is None
    assert [(error.line, error.code, error.param) for error in failed.errors.data] == [
        (3, "invalid_json_line", None),
        (4, "invalid_url", "url"),
        (5, "invalid_method", "method"),
        (6, "duplicate_custom_id", "custom_id"),
        (7, "invalid_json_line", None),
        (8, "missing_required_parameter", "body"),
        (9, "invalid_value", "custom_id"),
        (10, "invalid_type", "custom_id"),
        (11, "unsupported_parameter", "body.stream"),
        (12, "invalid_json_line", None),
        (13, "invalid_json_line", None),
    ]


def test_an_empty_file(api):
    failed = api.ended(api.create([b"", b"  "])["id"])
    assert [error.code for error in failed.errors.data] == ["empty_file"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-none"}, None),
        ({"input_file_id": None}, "input_file_id"),
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            "output_expires_after.seconds",
        ),
        ({"requests": []}, "requests"),
    ],
)
def test_bad_field_is_named(api, change, param):
    file_id = api.upload([api.line("a", prompt="x")])
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    status = 404 if change.get("input_file_id") == "file-none" else 400
    answer = api.post("/v1/batches", {**body, **change}, status)
    assert answer["error"]["param"] == param


def test_the_input_must_be_for_batches(api):
    file_id = api.upload([api.line("a", prompt="x")], purpose="assistants")
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    assert api.post("/v1/batches", body, 400)["error"]["param"] == "input_file_id"


def test_the_sdks_client(api):
    with sdk_over(api.app) as sdk:
        file_id = api.upload([api.line("a", prompt="x")])
        made = [
            sdk.batches.create(
                input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
            )
            for _ in range(3)
        ]
        assert [b.id for b in sdk.batches.list(limit=2)] == [b.id for b in reversed(made)]
        for batch in made:
            assert api.ended(batch.id).status == "completed"
        with pytest.raises(BadRequestError):
            sdk.batches.cancel(made[0].id)
        with pytest.raises(NotFoundError):
            sdk.batches.retrieve("batch_none")


class Held:
    """Keeps the engine from taking requests until it is let go."""

    def __init__(self, monkeypatch, engine):
        self.submit, self.gate, self.seen = engine.submit, threading.Event(), 0
        monkeypatch.setattr(engine, "submit", self.hold)

    def hold(self, request, outbox=None):
        self.seen += 1
        self.gate.wait(PATIENCE_S)
        return self.submit(request, outbox)


def test_cancel_ends_with_what_is_done(make_app, llm, monkeypatch):
    api = Client(make_app(batch_lines=2))
    held = Held(monkeypatch, llm.engine)
    batch = api.create([api.line(f"r{i}", prompt="x") for i in range(10)])
    until(lambda: held.seen == 2, "no line is run")
    assert api.post(f"/v1/batches/{batch['id']}/cancel")["status"] == "cancelling"
    assert api.post(f"/v1/batches/{batch['id']}/cancel")["status"] == "cancelling"
    held.gate.set()
    done = api.ended(batch["id"])
    assert (done.status, held.seen, done.request_counts.completed) == ("cancelled", 2, 2)
    assert done.cancelled_at and len(api.lines(done.output_file_id)) == 2
    left = api.lines(done.error_file_id)
    assert len(left) == 8 and {line["error"]["code"] for line in left} == {"batch_cancelled"}


def test_expiry_reports_what_was_not_run(make_app, llm, monkeypatch):
    api = Client(make_app(batch_lines=2))
    held = Held(monkeypatch, llm.engine)
    batch = api.create([api.line(f"r{i}", prompt="x") for i in range(5)], completion_window="1h")
    until(lambda: held.seen == 2, "no line is run")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3601)
    held.gate.set()
    done = api.ended(batch["id"])
    assert (done.status, done.request_counts.completed) == ("expired", 2)
    errors = api.lines(done.error_file_id)
    assert [line["custom_id"] for line in errors] == ["r2", "r3", "r4"]
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}


def test_a_full_engine_is_waited_for(api, llm, monkeypatch):
    submit, refused = llm.engine.submit, []

    def sometimes(request, outbox=None):
        if not refused:
            refused.append(request)
            raise CapacityError("full", retry_after_s=0.01)
        assert request.priority > 0
        return submit(request, outbox)

    monkeypatch.setattr(llm.engine, "submit", sometimes)
    done = api.ended(api.create([api.line("a", prompt="x")])["id"])
    assert done.request_counts.completed == 1 and len(refused) == 1


def test_goes_on_after_a_restart(make_app, llm, monkeypatch, store_settings):
    """Lines that were done are not run again; the input may be deleted meanwhile."""
    settings = {**store_settings, "batch_lines": 2}
    app = create_app(ServerConfig(**settings), llm)
    api = Client(app)
    lines = [api.line(f"r{i}", prompt="x" * (i + 1), max_tokens=1) for i in range(12)]
    prompts = []
    held = Held(monkeypatch, llm.engine)
    batch = api.create(lines)
    monkeypatch.setattr(
        held.gate,
        "wait",
        lambda timeout: held.seen <= 5 or threading.Event.wait(held.gate, timeout),
    )
    until(lambda: held.seen >= 7, "no line is run")
    until(lambda: api.get(f"/v1/batches/{batch['id']}")["request_counts"]["completed"] == 5, "5")
    assert api.http.delete(f"/v1/files/{batch['input_file_id']}").status_code == 200
    closing = threading.Thread(target=close_app, args=(app,))
    closing.start()
    time.sleep(0.2)
    held.gate.set()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()

    def record(request, outbox=None):
        prompts.append(len(request.prompt_token_ids))
        return held.submit(request, outbox)

    monkeypatch.setattr(llm.engine, "submit", record)
    api = Client(make_app(**settings))
    done = api.ended(batch["id"])
    assert done.status == "completed" and done.request_counts.completed == 12
    assert len(prompts) <= 7
    assert [o["custom_id"] for o in api.lines(done.output_file_id)] == [
        x["custom_id"] for x in lines
    ]
    blobs = api.app.extensions["store"].blobs
    until(lambda: len(list(blobs.ids())) == 1, "the input is kept")


def test_lines_have_the_limits_of_their_caller_and_end_with_his_key(make_app, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("mine requests=30 owner=us\nother owner=us\n")
    app = make_app(api_key_file=keys)
    headers = {"Authorization": "Bearer mine"}
    app.test_client_class = type(
        "Mine",
        (app.test_client_class or FlaskClient,),
        {"open": lambda self, *a, **k: FlaskClient.open(self, *a, **{"headers": headers, **k})},
    )
    started = time.monotonic()
    api = Client(app)
    batch = api.create([api.line(f"r{i}", prompt="x") for i in range(60)])  # its third request
    other = {"Authorization": "Bearer other"}

    def counts():
        answer = api.http.get(f"/v1/batches/{batch['id']}", headers=other)
        return answer.get_json()["request_counts"]

    until(lambda: counts()["completed"] >= 27, "no line is run")
    time.sleep(0.3)
    found = counts()
    assert found["failed"] == 0
    assert found["completed"] <= 28 + (time.monotonic() - started) * 30 / 60
    # In one step: a file that is empty for a moment lets nobody in.
    (tmp_path / "new").write_text("other owner=us\n")
    (tmp_path / "new").replace(keys)
    until(lambda: counts()["failed"] > 0, "the lines of a key that is gone are run")


@pytest.mark.parametrize("where", ["runner.add_line", "results.add_file", "runner.begin"])
def test_a_store_that_fails_for_a_while_costs_nothing(api, llm, monkeypatch, where):
    module, _, name = where.partition(".")
    module = importlib.import_module(f"oxillama_torch.server.batches.{module}")
    real, failures = getattr(module, name), []

    def failing(*args, **kwargs):
        if len(failures) < 3:
            failures.append(name)
            raise StoreError("the disk is full")
        return real(*args, **kwargs)

    submit, prompts = llm.engine.submit, []

    def record(request, outbox=None):
        prompts.append(request)
        return submit(request, outbox)

    monkeypatch.setattr(runner, "_STORE_RETRY_S", 0.01)
    monkeypatch.setattr(module, name, failing)
    monkeypatch.setattr(llm.engine, "submit", record)
    done = api.ended(api.create([api.line(f"r{i}", prompt="x") for i in range(5)])["id"])
    assert (done.status, done.request_counts.completed, len(failures)) == ("completed", 5, 3)
    assert len(prompts) == 5, "no line is run twice"
    assert len(api.lines(done.output_file_id)) == 5


def test_nobody_waits_for_a_batch(tmp_path):
    """Lines may hold every place of the engine; a client still gets the next one."""
    with LLM(max_batch_size=2, device="cpu") as llm:
        app = create_app(ServerConfig(), llm)
        api = Client(app)
        lines = [api.line(f"r{i}", prompt="x", max_tokens=400, ignore_eos=True) for i in range(8)]
        batch = api.create(lines)
        until(lambda: llm.engine.stats()["running"] == 2, "no line is run")
        for _ in range(3):
            body = {"model": api.model, "prompt": "x", "max_tokens": 2}
            api.post("/v1/completions", body)
        counts = api.get(f"/v1/batches/{batch['id']}")["request_counts"]
        assert counts["completed"] < 8
        assert llm.engine.stats()["preemptions"] >= 1
        api.post(f"/v1/batches/{batch['id']}/cancel")
        close_app(app)
