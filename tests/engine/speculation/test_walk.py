"""Guesses change no bit: tokens, log-probabilities and ends are those of plain decoding.

The oracle is the same request alone in a fresh engine without speculation; everything is compared
with ``==``, floats too. Models: tiny random llama and qwen3moe (experts); the demo model for
constraints, adapters and texts.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from proposers import Prophet, speculate
from tiny_models import write_tiny

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.config import EngineConfig, demo_model_path
from oxillama_torch.engine.engine import Engine
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.loader import load_model
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.custom import register_processor


@register_processor("test_no_repeats_of_three")
def no_repeats(token_ids, logits):
    """Depends on the tokens before: the last three are banned."""
    return logits.index_fill(0, torch.tensor(token_ids[-3:]), -torch.inf)


#: What a request may want of its tokens; those from ``penalties`` on depend on the ones before.
WISHES = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0},
    "narrowed": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "xtc": {"temperature": 1.0, "xtc_probability": 0.7, "xtc_threshold": 0.02},
    "biased": {"temperature": 1.0, "logit_bias": {7: 4.0, 9: -5.0}},
    "allowed": {"temperature": 1.0, "allowed_token_ids": tuple(range(5, 40))},
    "min_tokens": {"temperature": 1.0, "min_tokens": 6, "stop_token_ids": tuple(range(5, 100))},
    "penalties": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "window": {"temperature": 0.9, "presence_penalty": 1.0, "repeat_last_n": 5},
    "late penalties": {
        "temperature": 0.9,
        "repetition_penalty": 1.4,
        "samplers": ("temperature", "penalties"),
    },
    "dry": {
        "temperature": 0,
        "dry_multiplier": 0.8,
        "dry_allowed_length": 1,
        "dry_sequence_breakers": ((11,),),
    },
    "bad words": {"temperature": 1.0, "bad_words": ((7, 8), (30,))},
    "mirostat": {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 3.0},
    "mirostat 1": {"temperature": 1.0, "mirostat": 1, "mirostat_eta": 0.3},
    "processor": {"temperature": 0.7, "processors": ("test_no_repeats_of_three",)},
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "qwen3moe"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny(request.param, path, type_name="Q8_0")
    with read_gguf(path) as gguf:
        return load_model(gguf)


def requests():
    generator = torch.Generator().manual_seed(3)
    for index, wish in enumerate(WISHES.values()):
        prompt = torch.randint(5, 380, (1 + 5 * index % 37,), generator=generator).tolist()
        prompt_logprobs = 1 if index % 5 == 0 else None
        yield request_for(
            prompt, max_tokens=10, seed=index, logprobs=2, prompt_logprobs=prompt_logprobs, **wish
        )


def driver(model, **config) -> Driver:
    return Driver(Engine(model, EngineConfig(**{"page_size": 16, "kv_pages": 256, **config})))


@pytest.fixture(scope="module")
def alone(model) -> dict:
    """Prompt -> prompt log-probabilities, tokens, log-probabilities and end."""
    run = driver(model, prefix_cache=False)
    return {
        request.prompt_token_ids: (events[0].logprobs, events[1:])
        for request in requests()
        for events in run.run(request)
    }


def speculating(model, alone, rights, cls=Driver, **config) -> Driver:
    turns = itertools.cycle(rights)
    prophet = Prophet(
        lambda prompt: tokens_of(alone[prompt][1]), right=lambda: next(turns), wrong=(9, 8, 201)
    )
    return cls(speculate(driver(model, **config).engine, prophet, most=5))


def check(run: Driver, alone, *, rounds: int = 1) -> dict:
    for _ in range(rounds):
        wanted = list(requests())
        for request, events in zip(wanted, run.run(*wanted)):
            assert (events[0].logprobs, events[1:]) == alone[request.prompt_token_ids]
    stats = run.engine.stats()
    assert 0 < stats["accepted_tokens"] <= stats["proposed_tokens"]
    assert stats["failed"] == stats["step_failures"] == stats["proposer_failures"] == 0
    return stats


@pytest.mark.parametrize("rights", [[9], [2, 0, 1, 9, 3]], ids=["right", "half right"])
def test_in_a_mixed_batch(model, alone, rights):
    stats = check(speculating(model, alone, rights), alone)
    if rights == [9]:
        assert stats["proposed_tokens"] == stats["accepted_tokens"] and stats["steps"] <= 5


class Preempting(Driver):
    """Every third step the latest request loses its pages and has to come back."""

    def step(self, count: int = 1) -> None:
        super().step(count)
        scheduler = self.engine._scheduler
        if self.engine.stats()["steps"] % 3 == 0 and scheduler.running:
            scheduler._preempt(scheduler.running[-1])


def test_in_chunks_from_the_prefix_cache_and_after_preemption(model, alone):
    run = speculating(model, alone, [3, 1, 9, 0], Preempting, max_batch_tokens=33)
    stats = check(run, alone, rounds=2)
    assert stats["preemptions"] > 2 and stats["prefix_hit_tokens"] > 0


def chosen(llm: LLM, prompts, params, adapters=None) -> list:
    return [
        (c.text, c.token_ids, c.logprobs, c.finish_reason)
        for c in llm.generate(prompts, params, adapters=adapters)
    ]


@pytest.fixture(scope="module")
def llm():
    with LLM() as llm:
        llm.load_adapter("json", demo_model_path().parent / "adapters" / "json")
        yield llm


SCHEMA = Constraint.json_schema(
    {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Paris"]}, "n": {"type": "integer"}},
        "required": ["city", "n"],
        "additionalProperties": False,
    }
)
PROMPTS = ["import os\nimport sys\n\n", "def f(x):\n    return", "The city is"]


@pytest.mark.parametrize(
    ("params", "adapters"),
    [
        (SamplingParams(temperature=0, max_tokens=24, constraint=SCHEMA), None),
        (SamplingParams(seed=4, max_tokens=24, constraint=SCHEMA, logprobs=2), None),
        (SamplingParams(seed=4, max_tokens=24, stop=("os", "n:", "\n\n")), None),
        (SamplingParams(temperature=0, max_tokens=24, logprobs=0), "json"),
    ],
    ids=["schema", "schema with logprobs", "stop strings", "adapter"],
)
def test_constraints_stop_strings_and_adapters(llm, params, adapters):
    """In one process, with and without guesses that are right for some tokens."""
    plain = chosen(llm, PROMPTS, params, adapters)
    future = {tuple(llm.tokenize(p)): ids for p, (_, ids, *_) in zip(PROMPTS, plain)}
    turns = itertools.cycle([1, 9, 3, 0, 2])
    prophet = Prophet(future.__getitem__, right=lambda: next(turns), wrong=(300, 11))
    llm.engine.call(lambda engine: speculate(engine, prophet))
    try:
        assert chosen(llm, PROMPTS, params, adapters) == plain
        assert llm.engine.stats()["accepted_tokens"] > 0
    finally:
        llm.engine.call(lambda engine: setattr(engine._steps, "speculator", None))
