"""Load tests of servers. Oracle: a server with a known delay between its tokens; arithmetic."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from oxillama_torch.bench.load import Load, Stream, apply_load, first_model, prompt_of, summary
from oxillama_torch.errors import EngineError

GAP_S, TOKENS = 0.03, 5


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._send(200, {"data": [{"id": "fake/model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.headers.get("Authorization") != "Bearer key":
            self._send(401, {"error": {"message": "no key"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for _ in range(TOKENS):
            time.sleep(GAP_S)
            self._event({"choices": [{"delta": {"content": "x"}}], "usage": None})
        if self.server.fails:
            self._event({"error": {"message": "broken"}})
            return
        self._event({"choices": [], "usage": {"completion_tokens": TOKENS}})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data):
        self.wfile.write(b": ping\n\ndata: " + json.dumps(data).encode() + b"\n\n")

    def _send(self, status, data):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(data).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.bodies, server.fails = [], False
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def _load(server, **changes):
    settings = {"url": server.url, "model": "fake/model", "concurrency": 2, "requests": 4}
    return Load(**{**settings, "api_key": "key", "extra": {"ignore_eos": True}, **changes})


def test_figures_are_those_of_the_server(server):
    assert first_model(server.url) == "fake/model"
    row = apply_load(_load(server, new_tokens=TOKENS))
    assert (row["failed"], row["errors"]) == (0, "")
    assert 1e3 * GAP_S <= row["gap_p50_ms"] < 3e3 * GAP_S
    assert 1e3 * GAP_S <= row["ttft_p50_ms"] <= row["ttft_p99_ms"]
    assert row["tokens_s"] * row["seconds"] == pytest.approx(4 * TOKENS)
    assert row["seconds"] >= 2 * TOKENS * GAP_S
    assert "api_key" not in row
    assert all(body["ignore_eos"] and body["max_tokens"] == TOKENS for body in server.bodies)
    assert len({body["messages"][0]["content"] for body in server.bodies}) == 4


@pytest.mark.parametrize("fault", ["status", "event", "port"])
def test_failures_are_counted_and_told(server, fault):
    server.fails = fault == "event"
    changes = {"status": {"api_key": None}, "port": {"url": "http://127.0.0.1:9"}}.get(fault, {})
    row = apply_load(_load(server, **changes))
    assert row["failed"] == 4
    assert {"status": "401", "event": "broken", "port": "Connect"}[fault] in row["errors"]


def test_no_server():
    with pytest.raises(EngineError, match="no model at"):
        first_model("http://127.0.0.1:9")


def test_percentiles():
    load = Load(url="", model="", concurrency=1, requests=1)
    stream = Stream(0.0, [1.0 + i / 1000 for i in range(101)] + [2.0], 102)
    row = summary(load, [stream, Stream(0.0, error="late")], 4.0)
    assert row["ttft_p50_ms"] == 1000
    assert row["gap_p50_ms"] == pytest.approx(1.0)
    assert row["gap_max_ms"] == pytest.approx(900.0)
    assert row["failed"] == 1
    assert row["requests_s"] == 0.25


def test_prompts_differ_from_their_first_word_on():
    load = Load(url="", model="", concurrency=1, requests=1, prompt_words=7)
    prompts = [prompt_of(load, number) for number in range(50)]
    assert len({prompt.split()[0] for prompt in prompts}) == 50
    assert {len(prompt.split()) for prompt in prompts} == {8}
