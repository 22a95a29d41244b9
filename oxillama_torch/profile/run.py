"""Profile one request: load a model, warm up, record the prefill and the decode steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.loading import load_engine, open_model, resolve
from oxillama_torch.engine.request import GenerationRequest, RequestHandle
from oxillama_torch.profile.recorder import Record, Recorder, recording
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Profile", "profile_prompt"]


@dataclass(frozen=True, slots=True)
class Profile:
    """Records of a request, by phase.

    Args:
        phases: ``prefill`` and ``decode`` -> records of its steps.
        tokens: prompt and generated tokens.
        setting: device, dtype and numerics.
    """

    phases: dict[str, list[Record]]
    tokens: tuple[int, int]
    setting: tuple[str, str, str]


def profile_prompt(
    config: EngineConfig, prompt: str, new_tokens: int, trace: Path | None = None
) -> Profile:
    """Run a prompt greedily and record every kernel call.

    Args:
        config: model, device, numerics, kernels; the prefix cache is left out.
        prompt: text.
        new_tokens: tokens to generate, at least 2: the first belongs to the prefill.
        trace: where to write a Chrome trace of the same run, or None.
    """
    with open_model(config) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
        engine = load_engine(config, gguf, eos_ids=frozenset())
    ids = tuple(tokenizer.encode(prompt))
    device, dtype, numerics = resolve(config)
    with torch.inference_mode():
        _run(engine, ids, 2)  # warm up: allocations and first launches are nobody's share
        with recording(engine.model, device) as recorder, _traced(trace, device):
            steps = _run(engine, ids, new_tokens, recorder)
    records = recorder.records()
    phases = {
        "prefill": [record for record in records if record.step < steps],
        "decode": [record for record in records if record.step >= steps],
    }
    setting = (str(device), str(dtype).removeprefix("torch."), numerics)
    return Profile(phases, (len(ids), new_tokens), setting)


def _run(
    engine: Engine, ids: tuple[int, ...], new_tokens: int, recorder: Recorder | None = None
) -> int:
    """Drive the engine through one request. Returns the number of prefill steps."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0, seed=0)
    request = GenerationRequest(prompt_token_ids=ids, params=params)
    engine.add(RequestHandle(request, cancel=lambda _: None))
    steps = 0
    while engine.has_work:
        if recorder is not None:
            recorder.step = steps
        engine.step()
        steps += 1
    return steps - (new_tokens - 1)


@contextlib.contextmanager
def _traced(path: Path | None, device: torch.device) -> Iterator[None]:
    if path is None:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
