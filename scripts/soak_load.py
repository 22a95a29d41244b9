"""Clients of a soak: each runs requests of a catalogue over and over and compares the answers."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from soak_cases import FLEETING, HOT, EngineCase, HTTPCase, folded

from oxillama_torch.engine.request import FinishEvent, PromptEvent, TokenEvent
from oxillama_torch.llm import LLM

__all__ = [
    "Tally",
    "alone_engine",
    "alone_http",
    "begins",
    "call",
    "engine_client",
    "http_client",
    "swap_adapters",
]

_TIMEOUT_S = 600
#: One request in so many is left by its client before its end.
_LEAVES = 5


class Tally:
    """What became of the requests; any thread may book."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.losses: list[str] = []

    def book(self, kind: str, outcome: str) -> None:
        """Count an outcome: ``equal``, ``left`` or ``refused``."""
        with self._lock:
            self.counts[kind, outcome] += 1

    def lose(self, kind: str, what: str) -> None:
        """Book an answer that is not what it should be."""
        with self._lock:
            self.counts[kind, "wrong"] += 1
            self.losses.append(f"{kind}: {what}")


def call(url: str, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
    """One request that is not streamed: (status, body)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _stream(url: str, case: HTTPCase, pieces: int | None = None) -> tuple[int, list[dict]]:
    """The events of an answer; only so many, then the client is gone."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=_TIMEOUT_S)
    events: list[dict] = []
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", case.path, json.dumps(case.body), headers)
        response = connection.getresponse()
        if response.status != 200:
            return response.status, [{"error": response.read().decode()}]
        while line := response.readline():
            if line.startswith(b"data: {"):
                events.append(json.loads(line[6:]))
                if len(events) == pieces:
                    break
        return 200, events
    finally:
        connection.close()


def alone_http(url: str, case: HTTPCase) -> dict:
    """The answer when nothing else runs."""
    status, events = _stream(url, case)
    assert status == 200 and not any("error" in event for event in events), (case, events)
    return folded(events)


def http_client(
    url: str,
    cases: list[HTTPCase],
    right: dict[int, list[dict]],
    tally: Tally,
    over: Callable[[], bool],
    seed: int,
) -> None:
    """Run cases in random order until ``over``; ``right``: the answers to each that are right."""
    draw = random.Random(seed)
    while not over():
        number = draw.randrange(len(cases))
        case = cases[number]
        pieces = draw.randint(1, 20) if draw.randrange(_LEAVES) == 0 else None
        try:
            status, events = _stream(url, case, pieces)
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            tally.lose(case.kind, f"case {number}: {error!r}")
            continue
        failed = [event for event in events if "error" in event]
        if case.adapter == FLEETING and (status in (400, 404) or failed):
            tally.book(case.kind, "refused")
        elif failed:
            tally.lose(case.kind, f"case {number}: status {status}, {failed}")
        elif pieces is not None and len(events) == pieces:
            found = folded(events)
            good = any(begins(whole, found) for whole in right[number])
            _judge(tally, case.kind, number, good, "left", found, right[number])
        else:
            found = folded(events)
            _judge(tally, case.kind, number, found in right[number], "equal", found, right[number])


def begins(whole: dict, part: dict) -> bool:
    """Whether an answer begins with what a client saw before it left."""
    for index, choice in part["choices"].items():
        full = whole["choices"][index]
        for key, value in choice.items():
            if key != "end" and full[key][: len(value)] != value:
                return False
    return True


def _judge(
    tally: Tally, kind: str, number: int, good: bool, outcome: str, found: Any, wanted: Any
) -> None:
    if good:
        tally.book(kind, outcome)
    else:
        tally.lose(kind, f"case {number}: got {found}, wanted one of {wanted}")


def alone_engine(llm: LLM, case: EngineCase) -> list:
    """The events of a case when nothing else runs, but for how much the cache knew."""
    return _comparable(list(llm.engine.submit(case.fresh()).events()))


def _comparable(events: list) -> list:
    return [(e.prompt_tokens, e.logprobs) if isinstance(e, PromptEvent) else e for e in events]


def engine_client(
    llm: LLM,
    cases: list[EngineCase],
    right: dict[int, list[list]],
    tally: Tally,
    over: Callable[[], bool],
    seed: int,
) -> None:
    """As ``http_client``, of the engine itself."""
    draw = random.Random(seed)
    while not over():
        number = draw.randrange(len(cases))
        case = cases[number]
        leave = draw.randint(1, 20) if draw.randrange(_LEAVES) == 0 else None
        handle = llm.engine.submit(case.fresh())
        found = []
        try:
            for event in handle.events():
                found.append(event)
                if len(found) == leave:
                    handle.cancel()
        except Exception as error:
            tally.lose(case.kind, f"case {number}: {error!r}")
            continue
        tokens = sum(isinstance(event, TokenEvent) for event in found)
        last, seen = found[-1], _comparable(found)
        assert isinstance(last, FinishEvent)
        if last.completion_tokens != tokens:
            tally.lose(case.kind, f"case {number}: {tokens} tokens of {last.completion_tokens}")
        elif last.reason == "cancelled":
            good = any(whole[: len(seen) - 1] == seen[:-1] for whole in right[number])
            _judge(tally, case.kind, number, good, "left", seen, right[number])
        else:
            _judge(tally, case.kind, number, seen in right[number], "equal", seen, right[number])


def swap_adapters(
    load: Callable[[str, int], None],
    drop: Callable[[str], None],
    over: Callable[[], bool],
    tally: Tally,
    pause_s: float,
) -> None:
    """Replace HOT by its other version, load and drop FLEETING, again and again.

    Args:
        load: gives an adapter's name to one of its versions, 0 or 1.
        drop: takes the name away.
    """
    version = 0
    while not over():
        version = 1 - version
        try:
            load(HOT, version)
            tally.book("adapters", "replaced")
            load(FLEETING, 0)
            time.sleep(pause_s)
            drop(FLEETING)
            tally.book("adapters", "dropped")
        except Exception as error:
            tally.lose("adapters", repr(error))
        time.sleep(pause_s)
