"""Requests with every kind of sampling, through the engine: alone, together, preempted.

Oracle: the same request alone in an engine with room for everything (its steps are compared with
numpy in tests/sampling).
"""

from __future__ import annotations

import pytest
from engine_driver import Driver, request_for, tokens_of
from scripted_model import ScriptedModel

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.request import ErrorEvent
from oxillama_torch.sampling.custom import register_processor
from oxillama_torch.sampling.presets import PRESETS

KINDS = [
    {"mirostat": 1, "mirostat_tau": 3.0},
    {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.5},
    {"dry_multiplier": 2.0, "dry_allowed_length": 0, "dry_sequence_breakers": ((7,),)},
    {"xtc_probability": 0.5, "xtc_threshold": 0.02, "temperature": 0.7},
    {"repeat_last_n": 8, "repetition_penalty": 1.5, "frequency_penalty": 0.3},
    {"typical_p": 0.8, "eta_cutoff": 0.01, "dynatemp_range": 0.4},
    {"bad_words": ((9,), (11, 12)), "allowed_token_ids": tuple(range(5, 60)), "top_p": 0.9},
    PRESETS["llama.cpp"],
]


def driver(**options) -> Driver:
    return Driver(Engine(ScriptedModel(), EngineConfig(device="cpu", page_size=16, **options)))


def requests(max_tokens: int):
    return [
        request_for(
            [5 + number, 6, 7, 6, 7] * 3,
            **{"temperature": 1.0, "seed": number, "max_tokens": max_tokens, **kind},
        )
        for number, kind in enumerate(KINDS)
    ]


def test_neighbours_and_preemption_change_nothing():
    alone = [tokens_of(driver(kv_pages=64).run(request)[0]) for request in requests(40)]
    together = driver(kv_pages=64)
    assert [tokens_of(events) for events in together.run(*requests(40))] == alone
    scarce = driver(kv_pages=9, max_batch_tokens=40)
    found = [tokens_of(events) for events in scarce.run(*reversed(requests(40)))][::-1]
    assert found == alone and scarce.engine.stats()["preemptions"] > 0
    assert all(len(tokens) == 40 for tokens in alone)
    assert not any(9 in tokens for tokens in alone[6:7])


def test_a_failing_processor_ends_its_own_request():
    def fails_at_20(token_ids, logits):
        assert len(token_ids) < 20
        return logits

    register_processor("fails-at-20", fails_at_20)
    prompt = [5, 6, 7]
    run = driver(kv_pages=64)
    [failed, free] = run.run(
        request_for(prompt, max_tokens=30, processors=["fails-at-20"]),
        request_for(prompt, max_tokens=30),
    )
    assert isinstance(failed[-1], ErrorEvent) and "fails-at-20" in str(failed[-1].error)
    assert tokens_of(failed) == tokens_of(free)[:17], "what came before stands"
    assert run.engine.stats()["pages_used"] == 0


@pytest.mark.parametrize("forbidden", [{"bad_words": ((10**6,),)}, {"allowed_token_ids": (-1,)}])
def test_ids_outside_the_vocabulary_are_refused(forbidden):
    with pytest.raises(Exception, match="is not below"):
        driver().engine.check(request_for([5], **forbidden))
