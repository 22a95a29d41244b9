"""The way of events out of the batching thread: everything arrives once, readers are told once."""

from __future__ import annotations

import queue
import threading

import pytest
from engine_driver import request_for

from oxillama_torch.engine.outbox import Outbox, deliver
from oxillama_torch.engine.request import RequestHandle, TokenEvent


def handle_of(outbox):
    return RequestHandle(request_for([1]), lambda _: None, outbox)


def test_a_step_is_told_once_per_listener():
    told = {"a": [], "b": []}
    handles = []
    for name, listener in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        outbox = Outbox()
        outbox.notify(told[listener].append, name)
        handles.append(handle_of(outbox))
    assert told == {"a": [["a1"], ["a2"]], "b": [["b1"]]}, "once at once"
    for calls in told.values():
        calls.clear()
    step = [(handle, TokenEvent(n)) for n in (1, 2) for handle in handles]
    deliver(step)
    assert told == {"a": [["a1", "a2"]], "b": [["b1"]]}
    deliver(step[:1])
    assert len(told["a"]) == 1, "nobody has looked since"
    assert handles[0].outbox.take() == [step[0], step[3], step[0]]
    deliver(step[:2])
    assert told["a"][1:] == [["a1"]]


def test_a_reader_may_wait():
    outbox = Outbox()
    with pytest.raises(queue.Empty):
        outbox.get(timeout_s=0.01)
    outbox.put(None)
    assert outbox.get(timeout_s=120) is None
    assert outbox.take() == []


def test_nothing_is_lost_between_two_threads():
    """The reader sleeps until it is told; the writer never waits for it."""
    outbox, news, got, count = Outbox(), threading.Semaphore(0), [], 20_000
    outbox.notify(lambda _: news.release(), None)
    handle = handle_of(outbox)

    def read():
        while len(got) < count:
            assert news.acquire(timeout=120)
            got.extend(event.token_id for _, event in outbox.take())

    reader = threading.Thread(target=read)
    reader.start()
    for token_id in range(count):
        deliver([(handle, TokenEvent(token_id))])
    reader.join(120)
    assert got == list(range(count))
