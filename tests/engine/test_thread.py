"""The batching thread: many callers, faults, capacity, endings. Model: scripted."""

from __future__ import annotations

import threading
import time

import pytest
from engine_driver import request_for, tokens_of
from scripted_model import CRASH_ID, ScriptedModel, continuation

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.outbox import Outbox
from oxillama_torch.engine.request import ErrorEvent, FinishEvent, PromptEvent, TokenEvent
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import CapacityError, EngineError, RequestError

VOCABULARY = 61
PATIENCE_S = 120.0


class Gate:
    """Holds the model's steps back until the test lets them go."""

    def __init__(self, *, open: bool = False) -> None:
        self._steps = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self._open = open

    def __call__(self, batch) -> None:
        self.entered.release()
        if not self._open:
            assert self._steps.acquire(timeout=PATIENCE_S), "the test forgot to open the gate"

    def allow(self, steps: int = 1) -> None:
        self._steps.release(steps)

    def release(self) -> None:
        self._open = True
        self._steps.release(1000)


@pytest.fixture
def make_thread():
    made = []

    def make(model=None, *, inbox_size=256, start=True, **config):
        config = EngineConfig(**{"page_size": 16, "kv_pages": 64, **config})
        thread = EngineThread(Engine(model or ScriptedModel(), config), inbox_size=inbox_size)
        if start:
            thread.start()
        made.append((thread, model))
        return thread

    yield make
    for thread, model in made:
        if isinstance(getattr(model, "on_forward", None), Gate):
            model.on_forward.release()
        thread.stop(timeout_s=PATIENCE_S)


def wait_until(condition) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def expected(prompt, count):
    return continuation(prompt, count, VOCABULARY, set())


def test_many_threads_get_their_own_tokens(make_thread):
    engine, results = make_thread(max_batch_size=8), {}

    def ask(index):
        prompt = [5 + index, 6, 7 + index]
        handle = engine.submit(request_for(prompt, max_tokens=10))
        results[index] = (prompt, tokens_of(list(handle.events())))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 16
    assert all(tokens == expected(prompt, 10) for prompt, tokens in results.values())


def test_requests_that_share_an_outbox_are_told_apart(make_thread):
    engine, outbox = make_thread(), Outbox()
    handles = [engine.submit(request_for([5], max_tokens=3), outbox) for _ in range(2)]
    got = [outbox.get(timeout_s=PATIENCE_S) for _ in range(10)]
    for mine in handles:
        kinds = [type(event) for handle, event in got if handle is mine]
        assert kinds == [PromptEvent, TokenEvent, TokenEvent, TokenEvent, FinishEvent]


def test_a_missing_seed_is_chosen_and_told(make_thread):
    engine = make_thread()
    handles = [engine.submit(request_for([5], seed=None, max_tokens=1)) for _ in range(2)]
    seeds = {handle.request.params.seed for handle in handles}
    assert len(seeds) == 2 and None not in seeds


def test_bad_requests_are_refused_at_once(make_thread):
    with pytest.raises(RequestError, match="no tokens"):
        make_thread().submit(request_for([]))


def test_an_id_is_used_once_at_a_time(make_thread):
    gate = Gate()
    engine = make_thread(ScriptedModel(on_forward=gate), max_batch_size=1)
    handles = [engine.submit(request_for([5], max_tokens=2))]
    assert gate.entered.acquire(timeout=PATIENCE_S)
    handles.append(engine.submit(request_for([6], max_tokens=2)))
    for handle in handles:
        with pytest.raises(RequestError, match="is in use"):
            engine.submit(handle.request)
    gate.release()
    for handle in handles:
        list(handle.events())
    list(engine.submit(handles[0].request).events())


def test_a_full_inbox_says_when_to_come_back(make_thread):
    gate = Gate()
    engine = make_thread(ScriptedModel(on_forward=gate), inbox_size=3, max_batch_size=1)
    running = engine.submit(request_for([5], max_tokens=2))
    assert gate.entered.acquire(timeout=PATIENCE_S)
    waiting = [engine.submit(request_for([6], max_tokens=2)) for _ in range(3)]
    with pytest.raises(CapacityError) as caught:
        engine.submit(request_for([7]))
    assert caught.value.retry_after_s >= 1
    assert engine.stats()["waiting"] == 3
    gate.release()
    for handle in (running, *waiting):
        assert len(tokens_of(list(handle.events()))) == 2
    engine.submit(request_for([7], max_tokens=1))


def test_retry_after_follows_the_measured_rate():
    """4 requests a second end; with 100 waiting, half of them take 12.5 seconds."""
    now = [0.0]
    engine = Engine(ScriptedModel(), EngineConfig(page_size=16, kv_pages=8))
    thread = EngineThread(engine, clock=lambda: now[0])
    assert thread._retry_after_s(100) == 1.0, "nothing measured yet"
    for _ in range(20):
        engine._counters.finished += 1
        thread._deliver([])
        now[0] += 0.25
    assert thread._retry_after_s(100) == pytest.approx(12.5)
    assert thread._retry_after_s(1) == 1.0 and thread._retry_after_s(10**6) == 60.0


def test_cancelling_takes_effect_within_a_step(make_thread):
    gate = Gate()
    engine = make_thread(ScriptedModel(on_forward=gate), max_batch_size=2)
    first = engine.submit(request_for([5], max_tokens=500))
    assert gate.entered.acquire(timeout=PATIENCE_S)
    second = engine.submit(request_for([6, 7], max_tokens=3))
    first.cancel()
    first.cancel()
    gate.allow()  # the step that was running when the cancellation came
    assert gate.entered.acquire(timeout=PATIENCE_S)
    assert engine.stats()["pages_used"] == 1, "only the second request holds a page"
    gate.release()
    assert list(first.events())[-1].reason == "cancelled"
    assert tokens_of(list(second.events())) == expected([6, 7], 3)


def test_10000_cancels_leak_nothing(make_thread):
    engine = make_thread(inbox_size=20_000)
    handles = [engine.submit(request_for([5, 6], max_tokens=400)) for _ in range(10_000)]
    for handle in handles:
        handle.cancel()
    for handle in handles:
        assert isinstance(list(handle.events())[-1], FinishEvent)
    stats = engine.stats()
    assert stats["running"] == stats["waiting"] == stats["pages_used"] == 0
    assert stats["finished"] + stats["cancelled"] == 10_000


def test_a_consumer_that_raises_loses_only_its_own_request(make_thread, caplog):
    engine = make_thread()

    told = []

    def broken(names):
        told.append(names)
        if len(told) > 1:  # the first call is made by ``notify`` itself
            raise ValueError("scripted")

    outbox = Outbox()
    outbox.notify(broken, "mine")
    engine.submit(request_for([9], max_tokens=300), outbox)
    healthy = engine.submit(request_for([5], max_tokens=50))
    assert tokens_of(list(healthy.events())) == expected([5], 50)
    wait_until(lambda: engine.stats()["running"] == 0)
    assert engine.alive and len(told) == 2 and engine.stats()["cancelled"] == 1


def test_a_request_that_breaks_the_model_fails_alone(make_thread, caplog):
    engine = make_thread()
    good = [engine.submit(request_for([5 + i], max_tokens=30)) for i in range(3)]
    bad = engine.submit(request_for([6, CRASH_ID]))
    with pytest.raises(EngineError, match="failed on this request"):
        list(bad.events())
    for index, handle in enumerate(good):
        assert tokens_of(list(handle.events())) == expected([5 + index], 30)
    assert engine.alive


def test_when_the_thread_dies_everybody_is_told(make_thread, caplog):
    """Whatever escapes a step is our own bug: nobody is left waiting, nothing looks alive."""
    gate = Gate()
    engine = make_thread(ScriptedModel(on_forward=gate), max_batch_size=1)
    handles = [engine.submit(request_for([5], max_tokens=5)) for _ in range(3)]
    assert gate.entered.acquire(timeout=PATIENCE_S)

    def broken(*_):
        raise AssertionError("scripted")

    engine._engine._scheduler.postprocess = broken
    handles.append(engine.submit(request_for([6], max_tokens=5)))
    gate.release()
    for handle in handles:
        with pytest.raises(EngineError, match="has died"):
            list(handle.events())
    wait_until(lambda: not engine.alive)
    with pytest.raises(EngineError, match="has died"):
        engine.submit(request_for([5]))
    assert engine.stats()["alive"] == 0


def test_a_call_that_ends_the_thread_leaves_no_other_waiting(make_thread, caplog):
    engine, entered, gate = make_thread(), threading.Event(), threading.Event()
    answers = {}

    def ask(number, function):
        try:
            answers[number] = engine.call(function)
        except BaseException as error:
            answers[number] = error

    def wait(_):
        entered.set()
        return gate.wait(PATIENCE_S)

    def end(_):
        raise SystemExit

    functions = (wait, end, lambda _: "served")
    threads = [threading.Thread(target=ask, args=entry) for entry in enumerate(functions)]
    threads[0].start()
    assert entered.wait(PATIENCE_S)
    threads[1].start()
    wait_until(lambda: len(engine._calls) == 1)
    threads[2].start()
    wait_until(lambda: len(engine._calls) == 2)
    gate.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert answers[0] is True
    assert isinstance(answers[1], SystemExit) and isinstance(answers[2], EngineError)


def test_a_request_that_cannot_be_taken_in_fails_alone(make_thread, monkeypatch, caplog):
    engine = make_thread()
    monkeypatch.setattr(engine._engine, "check", lambda _: None)
    bad = engine.submit(request_for([5], stop_token_ids=(2**70,), min_tokens=1))
    with pytest.raises(EngineError, match="take this request in"):
        list(bad.events())
    good = engine.submit(request_for([5], max_tokens=3))
    assert tokens_of(list(good.events())) == expected([5], 3)


def test_stop_ends_what_is_running_and_what_waits(make_thread):
    gate = Gate()
    engine = make_thread(ScriptedModel(on_forward=gate), max_batch_size=1)
    handles = [engine.submit(request_for([5], max_tokens=500)) for _ in range(3)]
    assert gate.entered.acquire(timeout=PATIENCE_S)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    wait_until(lambda: engine._stopping)
    with pytest.raises(EngineError, match="not running"):
        engine.submit(request_for([5]))
    gate.allow()
    stopper.join()
    assert [list(handle.events())[-1].reason for handle in handles] == ["cancelled"] * 3
    assert not engine.alive
    engine.stop()


def test_stop_with_drain_finishes_first(make_thread):
    engine = make_thread(max_batch_size=2)
    handles = [engine.submit(request_for([5 + i], max_tokens=20)) for i in range(6)]
    engine.stop(drain=True)
    for index, handle in enumerate(handles):
        assert tokens_of(list(handle.events())) == expected([5 + index], 20)
    with pytest.raises(EngineError):
        engine.submit(request_for([5]))


def test_a_thread_that_was_never_started_can_be_stopped(make_thread):
    engine = make_thread(start=False)
    assert not engine.alive
    with pytest.raises(EngineError, match="not running"):
        engine.submit(request_for([5]))
    engine.stop()


def test_an_idle_engine_sleeps(make_thread):
    engine = make_thread()
    list(engine.submit(request_for([5], max_tokens=2)).events())
    wait_until(lambda: engine.stats()["running"] == 0)
    calls = []
    step = engine._engine.step
    engine._engine.step = lambda: calls.append(1) or step()
    time.sleep(0.1)
    assert not calls
    list(engine.submit(request_for([5], max_tokens=2)).events())
    assert len(calls) == 2


def test_a_step_that_hangs_can_be_seen(make_thread):
    gate = Gate()
    engine = make_thread(ScriptedModel(on_forward=gate))
    assert engine.stats()["step_age_s"] == 0
    handle = engine.submit(request_for([5], max_tokens=1))
    assert gate.entered.acquire(timeout=PATIENCE_S)
    wait_until(lambda: engine.stats()["step_age_s"] > 0.02)
    gate.release()
    assert isinstance(list(handle.events())[-1], FinishEvent)


def test_deadline_reaches_a_waiting_caller(make_thread):
    late = request_for([5], max_tokens=100, deadline=time.monotonic() - 1)
    assert list(make_thread().submit(late).events()) == [FinishEvent("deadline", 0)]


def test_an_error_event_ends_the_iteration(make_thread, caplog):
    handle = make_thread().submit(request_for([CRASH_ID]))
    event = handle.next_event(PATIENCE_S)
    assert isinstance(event, ErrorEvent)
