"""Clients that write without a pause, and a ledger of what the server has acknowledged to them.

A client notes what it was told at once, with what a later question about it must be answered.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable

from waiting import PATIENCE_S, until

__all__ = ["Api", "Gone", "Ledger", "wait_for_ends", "write_until"]

_LEAST_PER_ROUND = 8

_ENDED = ("completed", "failed", "cancelled", "expired", "incomplete")
_UNFINISHED = ("queued", "in_progress", "cancelling", "validating", "finalizing")

# (status, body) of an answer -> whether it may be given.
Allowed = Callable[[int, bytes], bool]


class Gone(Exception):  # noqa: N818 (the end of a round, no error)
    """The server has gone, or has no room: nothing is known of the request."""


class Api:
    """Requests to one server. ``model``: the one it serves."""

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url = url
        self.model = model or self.get("/v1/models")["data"][0]["id"]

    def ask(self, method: str, path: str, data: bytes | None, kind: str) -> tuple[int, bytes]:
        headers = {"Content-Type": kind} if data is not None else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                body = error.read()
            if error.code in (429, 503):
                raise Gone(body) from None
            assert error.code < 500, (method, path, body)
            return error.code, body
        except (OSError, http.client.HTTPException) as error:
            raise Gone(repr(error)) from None

    def post(self, path: str, **fields) -> dict:
        status, body = self.ask("POST", path, json.dumps(fields).encode(), "application/json")
        assert status in (200, 202), (path, body)
        return json.loads(body)

    def get(self, path: str) -> dict:
        status, body = self.ask("GET", path, None, "")
        assert status == 200, (path, body)
        return json.loads(body)

    def delete(self, path: str) -> None:
        status, body = self.ask("DELETE", path, None, "")
        assert status == 200, (path, body)

    def upload(self, content: bytes, purpose: str) -> str:
        """A file's id."""
        head = b"--b\r\nContent-Disposition: form-data; name="
        parts = head + b'"purpose"\r\n\r\n%b\r\n' % purpose.encode()
        parts += head + b'"file"; filename="x"\r\n\r\n%b\r\n--b--\r\n' % content
        kind = "multipart/form-data; boundary=b"
        status, body = self.ask("POST", "/v1/files", parts, kind)
        assert status == 200, body
        return json.loads(body)["id"]


class Ledger:
    """What was acknowledged. Thread-safe.

    Attributes:
        allowed: by path, what may be answered from now on.
        ending: by path, work that must come to an end.
        counts: acknowledgements by kind.
    """

    def __init__(self) -> None:
        self.allowed: dict[str, Allowed] = {}
        self.ending: dict[str, Callable[[dict], bool]] = {}
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, kind: str | None, path: str, allowed: Allowed) -> None:
        """Note what a path must answer; with a kind it is an acknowledgement."""
        with self._lock:
            self.allowed[path] = allowed
            if kind is not None:
                self.counts[kind] += 1

    def add_ending(self, kind: str, path: str, ended: Callable[[dict], bool]) -> None:
        """Note work that the server has taken on; it is an acknowledgement."""
        with self._lock:
            self.ending[path] = ended
            self.counts[kind] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def wrong(self, api: Api, paths=None) -> list[str]:
        """Paths that are not answered as they must be."""
        found = []
        for path in self.allowed if paths is None else paths:
            status, body = api.ask("GET", path, None, "")
            if not self.allowed[path](status, body):
                found.append(f"{path}: {status} {body[:300]!r}")
        return found


def _equal(expected: dict) -> Allowed:
    return lambda status, body: status == 200 and json.loads(body) == expected


def _has_ended(data: dict) -> bool:
    assert data["status"] in _ENDED + _UNFINISHED, data
    return data["status"] in _ENDED


def conversations(api: Api, ledger: Ledger, number: int) -> None:
    item = {"type": "message", "role": "user", "content": f"text {number}"}
    made = api.post("/v1/conversations", metadata={"n": "0"}, items=[item])
    path = f"/v1/conversations/{made['id']}"

    def at_least(n: int) -> Allowed:
        return lambda status, body: status == 200 and int(json.loads(body)["metadata"]["n"]) >= n

    ledger.add("conversation", path, at_least(0))
    for n in range(1, 4):
        api.post(path, metadata={"n": str(n)})
        ledger.add("conversation update", path, at_least(n))


def files(api: Api, ledger: Ledger, number: int) -> None:
    content = os.urandom(200) + b"%d" % number
    path = f"/v1/files/{api.upload(content, 'user_data')}"
    whole = f"{path}/content"
    ledger.add("file", whole, lambda status, body: (status, body) == (200, content))
    if number % 3 == 0:
        ledger.add(None, whole, lambda status, body: status == 404 or body == content)
        api.delete(path)
        ledger.add("file deletion", whole, lambda status, body: status == 404)


def responses(api: Api, ledger: Ledger, number: int) -> None:
    fields = {"model": api.model, "input": f"text {number}", "max_output_tokens": 3}
    made = api.post("/v1/responses", **fields)
    ledger.add("response", f"/v1/responses/{made['id']}", _equal(made))


def streamed_responses(api: Api, ledger: Ledger, number: int) -> None:
    """Once its last event is there a response is stored; one that was cut is not unfinished."""
    fields = {"model": api.model, "input": f"text {number}", "max_output_tokens": 30}
    data = json.dumps({**fields, "stream": True, "ignore_eos": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{api.url}/v1/responses", data, headers)

    def cut(status: int, body: bytes) -> bool:
        return status == 404 or json.loads(body)["status"] in _ENDED

    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            path = f"/v1/responses/{event.get('response', {}).get('id')}"
            if event["type"] == "response.created":
                ledger.add(None, path, cut)
            elif event["type"] in ("response.completed", "response.incomplete"):
                ledger.add("streamed response", path, _equal(event["response"]))


def background_responses(api: Api, ledger: Ledger, number: int) -> None:
    fields = {"model": api.model, "input": f"text {number}", "max_output_tokens": 60}
    made = api.post("/v1/responses", **fields, background=True, ignore_eos=True)
    ledger.add_ending("background response", f"/v1/responses/{made['id']}", _has_ended)


def stored_completions(api: Api, ledger: Ledger, number: int) -> None:
    messages = [{"role": "user", "content": f"text {number}"}]
    fields = {"model": api.model, "messages": messages, "max_tokens": 3, "store": True}
    made = api.post("/v1/chat/completions", **fields)
    text = made["choices"][0]["message"]["content"]

    def same(status: int, body: bytes) -> bool:
        return status == 200 and json.loads(body)["choices"][0]["message"]["content"] == text

    ledger.add("stored completion", f"/v1/chat/completions/{made['id']}", same)


def runs(api: Api, ledger: Ledger, number: int) -> None:
    assistant = api.post("/v1/assistants", model=api.model, instructions="x")
    ledger.add("assistant", f"/v1/assistants/{assistant['id']}", _equal(assistant))
    thread = api.post("/v1/threads")
    path = f"/v1/threads/{thread['id']}"
    ledger.add("thread", path, _equal(thread))
    for n in range(3):
        message = api.post(f"{path}/messages", role="user", content=f"text {number} {n}")
        ledger.add("message", f"{path}/messages/{message['id']}", _equal(message))
    run = api.post(f"{path}/runs", assistant_id=assistant["id"])
    ledger.add_ending("run", f"{path}/runs/{run['id']}", _has_ended)


def batches(api: Api, ledger: Ledger, number: int) -> None:
    """All lines are run, and none that was seen done is run again."""
    lines = 12
    body = {"model": api.model, "prompt": "import ", "max_tokens": 20, "ignore_eos": True}
    text = "\n".join(json.dumps({"custom_id": f"r{i}", "body": body}) for i in range(lines))
    file = api.upload(text.encode(), "batch")
    fields = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = api.post("/v1/batches", **fields)
    path, seen = f"/v1/batches/{batch['id']}", {}

    def done(data: dict) -> bool:
        if not _has_ended(data):
            return False
        assert (data["status"], data["request_counts"]["completed"]) == ("completed", lines), data
        return True

    def output(status: int, body: bytes) -> bool:
        found = {line["custom_id"]: line["id"] for line in map(json.loads, body.splitlines())}
        return status == 200 and seen.items() <= found.items()

    ledger.add_ending("batch", path, done)
    path = f"/v1/batch_jobs/{batch['id']}/output"
    for _ in range(20):
        status, body = api.ask("GET", path, None, "")
        if status == 200:
            found = {line["custom_id"]: line["id"] for line in map(json.loads, body.splitlines())}
            new = found.items() - seen.items()
            seen.update(found)
            for _ in new:
                ledger.add("batch line", path, output)


WRITERS = (
    conversations, files, responses, streamed_responses, background_responses, stored_completions,
    runs, batches,
)  # fmt: skip
# Work that goes on for a while: how often it is asked for before a kill.
_MOST = {background_responses: 3, runs: 4, batches: 1}


def write_until(api: Api, ledger: Ledger, end: Callable[[], None]) -> None:
    """One round: all writers at once, until ``end`` ends it at a moment of chance."""
    before, errors, stop = ledger.total, [], threading.Event()
    threads = [
        threading.Thread(target=_write, args=(writer, api, ledger, errors, stop))
        for writer in WRITERS
    ]
    for thread in threads:
        thread.start()
    until(lambda: errors or ledger.total >= before + _LEAST_PER_ROUND, "nothing is acknowledged")
    time.sleep(random.uniform(0, 1.5))
    end()
    stop.set()
    for thread in threads:
        thread.join(2 * PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a client hangs"
    assert not errors, errors


def _write(writer: Callable, api: Api, ledger: Ledger, errors: list, stop: threading.Event) -> None:
    """Have one client write until the server has gone; ``stop``: it may be back already."""
    numbers = range(_MOST[writer]) if writer in _MOST else itertools.count()
    try:
        with contextlib.suppress(Gone, OSError, http.client.HTTPException):
            for number in numbers:
                if stop.is_set():
                    break
                writer(api, ledger, number)
    except BaseException as error:
        errors.append(error)


def wait_for_ends(api: Api, ledger: Ledger, kind: str = "", timeout_s: float = PATIENCE_S) -> None:
    """Wait until the work whose path holds ``kind`` has come to its end."""
    for path, ended in ledger.ending.items():
        if kind in path:
            until(lambda p=path, e=ended: e(api.get(p)), f"{path} does not end", timeout_s)
