"""The thread that runs responses. Oracle: what was put in comes out once, in order.

The engine is scripted: it hands out the events that a test gives it.
"""

import json
import time
from concurrent.futures import Future

import pytest
from response_skeleton import skeleton
from scripted_engine import ScriptedEngine
from waiting import PATIENCE_S, until

from oxillama_torch.config import ServerConfig
from oxillama_torch.engine.request import ErrorEvent, FinishEvent, PromptEvent, TokenEvent
from oxillama_torch.errors import EngineError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.output import Generation
from oxillama_torch.server.responses.builder import ResponseBuilder
from oxillama_torch.server.responses.event_log import EventLog
from oxillama_torch.server.responses.runner import ResponseJob, ResponseRunner
from oxillama_torch.server.service import Service
from oxillama_torch.server.store.errors import StoreError


@pytest.fixture
def runner():
    runner = ResponseRunner()
    yield runner
    runner.close()


class Driver:
    """A job whose engine is in the test's hands."""

    def __init__(self, runner, llm, save=None, patient=False, **params):
        self.engine = ScriptedEngine()
        service = Service("m", self.engine, llm.tokenizer, None, ServerConfig(), "b0")
        generation = Generation(service, [[1]], SamplingParams(**params))
        self.send = next(iter(self.engine.senders.values()))
        builder = ResponseBuilder(skeleton(id=f"resp_{id(self)}"), llm.tokenizer, logprobs=False)
        self.job = ResponseJob(builder, generation, save, EventLog(keep=True), patient=patient)
        runner.start(self.job)

    def kinds(self):
        """Types of the events so far, without the deltas."""
        kinds = [json.loads(line)["type"] for line in self.job.log.take(0)]
        return [kind.removeprefix("response.") for kind in kinds if "delta" not in kind]

    def text(self):
        lines = map(json.loads, self.job.log.take(0))
        return "".join(e["delta"] for e in lines if e["type"] == "response.output_text.delta")


def terminals(kinds):
    return [kind for kind in kinds if kind in ("completed", "incomplete", "failed")]


def test_jobs_do_not_mix(runner, llm):
    ids = llm.tokenize("def f(x):\n    return x + 1\n")
    shifted = [ids[i:] + ids[:i] for i in range(10)]
    drivers = [Driver(runner, llm) for _ in shifted]
    for driver in drivers:
        driver.send(PromptEvent(1, 0))
    for step in range(len(ids)):
        for driver, tokens in zip(drivers, shifted, strict=True):
            driver.send(TokenEvent(tokens[step]))
    for driver, tokens in zip(drivers, shifted, strict=True):
        driver.send(FinishEvent("stop", len(tokens)))
        assert driver.job.done.wait(PATIENCE_S)
        assert driver.text() == llm.detokenize(tokens)
        assert terminals(driver.kinds()) == ["completed"]


def test_events_after_the_end_change_nothing(runner, llm):
    """A stop string ends the text; the engine's own end comes later."""
    driver = Driver(runner, llm, stop=("import",))
    driver.send(PromptEvent(1, 0))
    for token in llm.tokenize("x import os"):
        driver.send(TokenEvent(token))
    assert driver.job.done.wait(PATIENCE_S)
    before = driver.kinds()
    driver.send(FinishEvent("cancelled", 3))
    another = Driver(runner, llm)
    another.send(FinishEvent("stop", 0))
    assert another.job.done.wait(PATIENCE_S)
    assert driver.kinds() == before
    assert terminals(before) == ["completed"]


def test_last_event_waits_for_the_store(runner, llm):
    saved = Future()
    driver = Driver(runner, llm, save=lambda job: saved)
    driver.send(FinishEvent("stop", 0))
    until(lambda: "output_item.done" in driver.kinds())
    time.sleep(0.05)
    assert terminals(driver.kinds()) == []
    saved.set_result(None)
    assert driver.job.done.wait(PATIENCE_S)
    assert terminals(driver.kinds()) == ["completed"]


def test_acknowledged_response_waits_for_the_store_to_come_back(runner, llm, monkeypatch):
    monkeypatch.setattr("oxillama_torch.server.responses.runner._RETRY_S", 0.02)
    tries = []

    def save(job):
        future = Future()
        tries.append(future)
        if len(tries) < 3:
            future.set_exception(StoreError("the disk is full"))
        else:
            future.set_result(None)
        return future

    driver = Driver(runner, llm, save=save, patient=True)
    driver.send(FinishEvent("stop", 0))
    assert driver.job.done.wait(PATIENCE_S)
    assert len(tries) == 3
    assert terminals(driver.kinds()) == ["completed"]
    assert driver.job.error is None


@pytest.mark.parametrize("error", [StoreError("the disk is full"), KeyError("bug")])
def test_what_cannot_be_stored_has_failed(runner, llm, error):
    saved = Future()
    driver = Driver(runner, llm, save=lambda job: saved)
    driver.send(FinishEvent("stop", 0))
    saved.set_exception(error)
    assert driver.job.done.wait(PATIENCE_S)
    assert terminals(driver.kinds()) == ["failed"]
    assert driver.job.error is not None


def test_error_of_the_engine_fails_one_response(runner, llm):
    broken, sound = Driver(runner, llm), Driver(runner, llm)
    broken.send(ErrorEvent(EngineError("out of luck")))
    assert broken.job.done.wait(PATIENCE_S)
    assert terminals(broken.kinds()) == ["failed"]
    sound.send(FinishEvent("stop", 0))
    assert sound.job.done.wait(PATIENCE_S)
    assert terminals(sound.kinds()) == ["completed"]


def test_cancelled_response_ends_once(runner, llm):
    driver = Driver(runner, llm)
    driver.send(PromptEvent(1, 0))
    driver.job.cancel()
    driver.job.cancel()
    assert driver.engine.cancelled
    driver.send(FinishEvent("cancelled", 0))
    assert driver.job.done.wait(PATIENCE_S)
    assert driver.job.snapshot()["status"] == "cancelled"
    assert terminals(driver.kinds()) == ["incomplete"]
    until(lambda: runner.find(driver.job.id) is None)


def test_closing_ends_what_is_in_progress(llm):
    runner = ResponseRunner()
    driver = Driver(runner, llm)
    runner.close()
    assert driver.job.done.is_set()
    assert driver.engine.cancelled
    late = Driver(runner, llm)
    assert late.job.done.is_set()
