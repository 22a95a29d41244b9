"""Adapters come and are merged while requests run on: what takes long is done in other threads.

Oracle: where it is done. Reading waits until a running request has got more tokens, so that it
could not end if that request waited for it; of compiling, torch says in which thread it began.
"""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_adapters import save_adapter
from tiny_models import write_tiny

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.engine.request import FinishEvent, GenerationRequest, TokenEvent
from oxillama_torch.kernels import registry
from oxillama_torch.lora import registry as adapter_registry
from oxillama_torch.lora.merge import Merger

WAIT_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unstalled")
    save_adapter(write_tiny("llama", folder / "tiny.gguf", type_name="Q8_0"), folder / "a", seed=1)
    return folder


class Running:
    """A request that decodes, and another one where it has come to its end."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.handle = self._begin()
        self.wait_for(1)

    def _begin(self):
        params = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
        request = GenerationRequest(prompt_token_ids=(5, 6, 7), params=params)
        return self._llm.engine.submit(request)

    def wait_for(self, count: int) -> None:
        """Until so many tokens more than there are now have been chosen."""
        if any(isinstance(event, FinishEvent) for _, event in self.handle.outbox.take()):
            self.handle = self._begin()
        while count:
            event = self.handle.next_event(WAIT_S)
            count -= isinstance(event, TokenEvent)
            if isinstance(event, FinishEvent):
                self.handle = self._begin()


def slowed(running: Running, function):
    """The function, which meanwhile waits for five tokens of the running request."""

    def slow(*args, **options):
        running.wait_for(5)
        return function(*args, **options)

    return slow


def test_a_request_runs_on_while_adapters_are_read_and_merged(folder, monkeypatch):
    with LLM(folder / "tiny.gguf", device="cpu", kv_pages=32) as llm:
        running = Running(llm)
        for module, name in (
            (adapter_registry, "read_adapter"),
            (adapter_registry, "factor_table"),
            (Merger, "prepare"),
        ):
            monkeypatch.setattr(module, name, slowed(running, getattr(module, name)))
        llm.load_adapter("a", folder / "a")
        llm.merge_adapter("a")
        llm.unmerge_adapter("a")
        running.handle.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["same", "f16"])
def test_nothing_is_compiled_in_the_batching_thread(folder, dtype):
    """Merging takes products apart: they have other shapes then, and other types."""
    before, began = registry.active_rules(), []

    def note(*_) -> None:
        began.append(threading.current_thread().name)

    handler = torch._dynamo.callback.callback_handler
    handler.register_start_callback(note)
    try:
        rules = "quant_matmul=compiled"
        with LLM(folder / "tiny.gguf", device="cpu", kv_pages=32, kernels=rules) as llm:
            running = Running(llm)
            llm.load_adapter("a", folder / "a")
            began.clear()
            llm.merge_adapter("a", merge_dtype=dtype)
            running.wait_for(5)
            llm.generate("other shapes: several rows at once", SamplingParams(max_tokens=3))
            llm.unmerge_adapter("a")
            running.wait_for(2)
            running.handle.cancel()
    finally:
        handler.remove_start_callback(note)
        registry.set_rules(before)
    assert "oxillama-engine" not in began
