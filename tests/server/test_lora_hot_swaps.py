"""Adapters loaded, replaced and dropped while a real server streams.

Oracle: the texts of the same server when nothing else runs; with invariant numerics they are equal
to the last bit, whatever runs beside them.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request

import pytest
from demo_adapters import write_adapter
from server_process import running_server
from waiting import PATIENCE_S

TOKENS = 32
PROMPT = "import os\n\ndef join("


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("red", "blue", "first", "second", "other")):
        write_adapter(root / name, seed)
    return root


@pytest.fixture(scope="module")
def server(root):
    options = ["--numerics", "invariant", "--adapter-root", root]
    options += ["--lora", f"red={root / 'red'}", "--lora", f"blue={root / 'blue'}"]
    with running_server(*options) as url:
        yield url


def call(server, method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}{path}", data, headers, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return json.load(response)


def load(server, name, path):
    call(server, "POST", "/admin/loras", {"name": name, "path": path})


def stream(server, lora, index):
    """(text, completion tokens, longest time between two pieces in seconds)."""
    body = {
        "model": call(server, "GET", "/v1/models")["data"][0]["id"], "prompt": PROMPT[index:],
        "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "lora": lora, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{server}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    text, gaps, last, usage = "", [], None, None
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            now = time.monotonic()
            gaps += [] if last is None else [now - last]
            last = now
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
    return text, usage["completion_tokens"], max(gaps)


def at_once(server, choices):
    """Results of streams that run together."""
    results = [None] * len(choices)

    def run(index):
        results[index] = stream(server, *choices[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def pair(first, second):
    return [{"name": "red", "scale": first}, {"name": "blue", "scale": second}]


def test_hot_swaps_under_load_lose_no_token(server):
    choices = [(pair(0.5, 0.5), 0), (pair(1.0, -0.4), 1), ("red", 2), (None, 3), ("blue", 4)]
    choices += [(pair(0.2, 0.9), 5)]
    quiet = {str(choice): stream(server, *choice)[0] for choice in choices}
    versions = {}
    for version in ("first", "second"):
        load(server, "hot", version)
        versions[version] = stream(server, "hot", 0)[0]
    assert len({*quiet.values(), *versions.values()}) == len(choices) + 2, "texts must differ"
    many = [*choices, ("hot", 0)] * 2
    before = at_once(server, many)
    stop, swaps = threading.Event(), []

    def swap():
        while not stop.is_set():
            load(server, "hot", ("first", "second")[len(swaps) % 2])
            load(server, "other", "other")
            call(server, "DELETE", "/admin/loras/other")
            swaps.append(time.monotonic())
            stop.wait(0.05)

    swapper = threading.Thread(target=swap)
    swapper.start()
    during = at_once(server, many) + at_once(server, many)
    stop.set()
    swapper.join()
    assert len(swaps) >= 3, "too few swaps to tell anything"
    for (lora, index), (text, tokens, _) in zip(many * 3, before + during):
        assert tokens == TOKENS
        if lora == "hot":  # the version it began with, to its end
            assert text in versions.values()
        else:
            assert text == quiet[str((lora, index))]
    longest = [max(gap for _, _, gap in results) for results in (before, during)]
    print(
        f"\n{len(many)} streams, {3 * len(swaps)} loads and drops: longest time between two pieces "
        f"{1000 * longest[0]:.0f} ms without them, {1000 * longest[1]:.0f} ms with them"
    )
