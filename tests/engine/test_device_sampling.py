"""The ``sample`` op in the engine: the chain's tokens and log-probabilities, whoever shares a step.

Oracle: the same requests with the chain, whose steps are compared with numpy in tests/sampling.
"""

from __future__ import annotations

import pytest
from engine_driver import Driver, request_for
from scripted_model import NAN_ID, ScriptedModel

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.device_sampling import is_served
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent
from oxillama_torch.kernels.registry import use_kernels
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.sampling.presets import PRESETS
from oxillama_torch.sampling.row import SamplingRow

SERVED = [
    {"temperature": 0},
    {"temperature": 0, "top_k": 5, "samplers": ("top_k", "min_p")},
    {"temperature": 0.3, "samplers": ("top_k", "top_p"), "top_p": 0.9},
    {"temperature": 0.7, "top_k": 5, "logprobs": 0},
    {"top_p": 0.8, "min_p": 0.05, "logprobs": 3},
    {"temperature": 1.5, "repetition_penalty": 1.3, "top_k": 2**31},
    {"presence_penalty": 0.8, "frequency_penalty": -0.5, "logprobs": 1},
    {"repetition_penalty": 1.5, "repeat_last_n": 4, "top_p": 0.95},
    {"temperature": 0, "repetition_penalty": 2.0, "repeat_last_n": 6},
    {"logprobs": 2, "logprobs_mode": "masked", "stop_token_ids": (9,)},
]
REFUSED = [
    {"logit_bias": {9: 1.0}},
    {"min_tokens": 3, "stop_token_ids": (9,)},
    {"bad_words": ((9,),)},
    {"allowed_token_ids": (5, 6)},
    {"typical_p": 0.5},
    {"mirostat": 2},
    {"dynatemp_range": 0.5},
    {"top_p": 0.5, "min_keep": 3},
    {"top_k": 3, "temperature": 0.5, "samplers": ("top_k", "temperature")},
    {"dry_multiplier": 1.0, "dry_sequence_breakers": ((7,),)},
    {"xtc_probability": 0.5},
    {"frequency_penalty": 1.0, "temperature": 0.7, "samplers": ("temperature", "penalties")},
]


def driver(**options) -> Driver:
    config = EngineConfig(device="cpu", page_size=16, kv_pages=64)
    return Driver(Engine(ScriptedModel(), config, **options))


def requests(kinds, max_tokens=12):
    return [
        request_for(
            [5 + number, 6, 7, 6],
            **{"temperature": 1.0, "seed": number - 3, "max_tokens": max_tokens, **kind},
        )
        for number, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("triton", marks=pytest.mark.interpret)]
)
def test_tokens_and_logprobs_are_those_of_the_chain(backend):
    # The interpreter takes a second for four rows.
    kinds, tokens = (SERVED, 12) if backend == "reference" else (SERVED[3:6], 2)
    banned = frozenset({20, 21, 22})
    by_chain, by_op = driver(banned_ids=banned), driver(banned_ids=banned)
    expected = by_chain.run(*requests(kinds, tokens))
    with use_kernels(f"sample={backend}"):
        assert by_op.run(*requests(kinds, tokens)) == expected
    stats = by_op.engine.stats()
    assert stats["sampled_by_op"] >= 2 * len(kinds) and stats["sampled_by_chain"] == 0
    assert by_chain.engine.stats()["sampled_by_op"] == 0


def test_one_row_that_wants_more_sends_its_step_to_the_chain():
    kinds = [*SERVED[:3], {"min_tokens": 3, "stop_token_ids": (9,)}]
    expected, run = driver().run(*requests(kinds)), driver()
    with use_kernels("sample=reference"):
        assert run.run(*requests(kinds)) == expected
    assert run.engine.stats()["sampled_by_chain"] == 3 * len(kinds)


@pytest.mark.parametrize("kind", [*SERVED, *REFUSED, PRESETS["llama.cpp"]], ids=repr)
def test_what_is_served(kind):
    params = SamplingParams(**{"temperature": 1.0, "seed": 1, **kind})
    row = SamplingRow(params, [5, 6], (1, *params.stop_token_ids))
    assert is_served(row) is (kind in SERVED)


def test_rows_without_a_token_say_why():
    run = driver(banned_ids=frozenset(range(61)))
    with use_kernels("sample=reference"):
        [[failed]] = run.run(request_for([5, 6], temperature=1.0))
    assert isinstance(failed, ErrorEvent) and "banned" in str(failed.error)
    run = driver()
    with use_kernels("sample=reference"):
        broken, whole = run.run(request_for([5, NAN_ID]), request_for([5, 6], max_tokens=4))
    assert "not finite" in str(broken[-1].error) and len(whole) == 6
