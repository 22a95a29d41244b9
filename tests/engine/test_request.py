"""The caller's end of a request."""

from __future__ import annotations

import queue

import pytest
from engine_driver import request_for

from oxillama_torch.engine.request import (
    ErrorEvent,
    FinishEvent,
    PromptEvent,
    RequestHandle,
    TokenEvent,
)
from oxillama_torch.errors import EngineError


def test_events_come_in_order_and_end_with_the_last():
    handle = RequestHandle(request_for([1]), lambda _: None)
    events = [PromptEvent(1, 0), TokenEvent(5), FinishEvent("length", 1)]
    for event in events:
        handle.put(event)
    assert list(handle.events()) == events


def test_an_error_is_raised_to_the_reader():
    handle = RequestHandle(request_for([1]), lambda _: None)
    handle.put(TokenEvent(5))
    handle.put(ErrorEvent(EngineError("broken")))
    events = handle.events()
    assert next(events) == TokenEvent(5)
    with pytest.raises(EngineError, match="broken"):
        next(events)


def test_waiting_has_a_limit():
    with pytest.raises(queue.Empty):
        RequestHandle(request_for([1]), lambda _: None).next_event(timeout_s=0.01)


def test_cancel_names_the_request():
    cancelled = []
    handle = RequestHandle(request_for([1]), cancelled.append)
    handle.cancel()
    assert cancelled == [handle.request_id]


def test_ids_are_unique():
    assert len({request_for([1]).request_id for _ in range(100)}) == 100
