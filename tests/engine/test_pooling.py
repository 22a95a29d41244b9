"""Embeddings pooled in the engine.

Oracles: a tiny HuggingFace model with the same weights; the same request alone, compared with
``==``.
"""

import math

import numpy as np
import pytest
import torch
from engine_driver import Driver, request_for
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.pooling import finish_pooling, pool_rows
from oxillama_torch.errors import RequestError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.loader import load_model

POOLINGS = {
    "last": lambda hidden: hidden[-1],
    "first": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(0),
    "max": lambda hidden: hidden.amax(0),
}
LENGTHS = (1, 2, 15, 16, 17, 33, 50)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    oracle = write_tiny("llama", path)
    with read_gguf(path) as gguf:
        return load_model(gguf), oracle


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 380, (n,), generator=generator).tolist() for n in LENGTHS]


def requests():
    for prompt in prompts():
        for pooling in POOLINGS:
            yield request_for(prompt, capture="hidden", pooling=pooling, max_tokens=0)


def driver(model, **config):
    return Driver(Engine(model, EngineConfig(**{"page_size": 16, "kv_pages": 256, **config})))


@pytest.fixture(scope="module")
def alone(models):
    run = driver(models[0], prefix_cache=False)
    return [run.run(request)[0][0].captured for request in requests()]


def test_as_transformers_has_it(models, alone):
    rows = iter(alone)
    for prompt in prompts():
        with torch.no_grad():
            hidden = models[1].model(torch.tensor([prompt])).last_hidden_state[0]
        for pool in POOLINGS.values():
            row = next(rows)
            assert row.dtype == np.float32 and row.shape == (1, hidden.shape[1])
            torch.testing.assert_close(torch.from_numpy(row[0]), pool(hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [5, 17, 512])
def test_the_same_bits_in_a_batch_and_in_chunks(models, alone, budget):
    run = driver(models[0], max_batch_tokens=budget)
    together = [events[0].captured for events in run.run(*requests())]
    assert all((a == b).all() for a, b in zip(together, alone))


def test_the_same_bits_after_preemption_and_from_the_prefix_cache(models, alone):
    run = driver(models[0], max_batch_tokens=16)
    for _ in range(2):
        ids = [run.add(request) for request in requests()]
        while run.engine.has_work:
            run.step()
            scheduler = run.engine._scheduler
            if run.engine.stats()["steps"] % 3 == 0 and scheduler.running:
                scheduler._preempt(scheduler.running[-1])
        found = [run.events[request_id][0] for request_id in ids]
        assert all((event.captured == b).all() for event, b in zip(found, alone))
    # Only an embedding of the last token can use what the prefix cache knows of the others.
    assert found[-4].cached_tokens == 48 and found[-1].cached_tokens == 0


def test_a_mean_does_not_depend_on_the_cut():
    """One column, where numpy's own sum would pair rows up."""
    values = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1)).numpy() * 1e3

    def mean(size):
        pooled = None
        for start in range(0, len(values), size):
            pooled = pool_rows("mean", pooled, values[start : start + size])
        return finish_pooling("mean", pooled, len(values))

    assert mean(1) == mean(7) == mean(1000)
    assert math.isclose(mean(7).item(), math.fsum(values[:, 0]) / 1000, rel_tol=1e-6)


def test_nothing_is_pooled_but_hidden_states(models):
    run = driver(models[0])
    for fields in ({"capture": "logits"}, {}, {"capture": "hidden", "prompt_logprobs": 1}):
        with pytest.raises(RequestError) as error:
            run.add(request_for([5], pooling="last", **fields))
        assert error.value.param == "pooling"
