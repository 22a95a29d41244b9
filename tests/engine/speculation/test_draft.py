"""Draft models: keys and values in mirrored pages, vocabularies.

Oracle: a draft that is the model itself is right about every greedy token, whatever has become of
the pages in between; one wrong place in its keys and values would show as a wrong guess.
"""

from __future__ import annotations

import pytest
import torch
from engine_driver import Driver, request_for, tokens_of
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.speculation.choice import check_vocabulary
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.kvcache.pool import page_bytes
from oxillama_torch.models.loader import load_model


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny("llama", path, type_name="Q8_0")
    with read_gguf(path) as gguf:
        return load_model(gguf)


def driver(model, draft=None, **config) -> Driver:
    config = {"page_size": 16, "kv_pages": 64, "max_batch_tokens": 64} | config
    if draft is not None:
        config |= {"speculation": "draft", "draft_tokens": 3}
    return Driver(Engine(model, EngineConfig(**config), draft=draft))


def requests(count=3, max_tokens=24):
    generator = torch.Generator().manual_seed(5)
    for length in (40, 3, 17)[:count]:
        prompt = torch.randint(5, 380, (length,), generator=generator).tolist()
        yield request_for(prompt, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def plain(model) -> list[list[int]]:
    return [tokens_of(events) for events in driver(model).run(*requests())]


def check(run: Driver, plain) -> dict:
    assert [tokens_of(events) for events in run.run(*requests())] == plain
    stats = run.engine.stats()
    assert stats["proposed_tokens"] == stats["accepted_tokens"] > 0
    assert stats["proposer_failures"] == 0
    return stats


def test_the_model_itself_is_always_right(model, plain):
    run = driver(model, model)
    stats = check(run, plain)
    assert stats["steps"] < 12 and stats["generated_tokens"] == 72
    # A second time, the prompts come from the prefix cache, the draft's keys and values too.
    assert check(run, plain)["prefix_hit_tokens"] >= 48


def test_a_prompt_longer_than_a_pass_is_caught_up_with(model, plain):
    check(driver(model, model, max_batch_tokens=16), plain)


def test_after_preemption(model, plain):
    class Preempting(Driver):
        def step(self, count: int = 1) -> None:
            super().step(count)
            scheduler = self.engine._scheduler
            if self.engine.stats()["steps"] % 3 == 0 and scheduler.running:
                scheduler._preempt(scheduler.running[-1])

    for prefix_cache in (False, True):
        run = Preempting(driver(model, model, prefix_cache=prefix_cache).engine)
        assert check(run, plain)["preemptions"] > 1


def test_pages_that_were_given_out_again_are_computed_again(model):
    """Eight pages: what later requests write is what earlier ones have left."""
    run = driver(model, model, kv_pages=8)
    for seed in range(6):
        prompt = torch.randint(
            5, 380, (40,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        run.run(request_for(prompt, max_tokens=12))
    stats = run.engine.stats()
    assert stats["proposed_tokens"] == stats["accepted_tokens"] > 0


def test_a_prefix_that_the_draft_has_not_seen(model, plain):
    """Pages in the prefix cache whose request never guessed."""
    run = driver(model, model)
    run.run(*requests(max_tokens=1))
    assert run.engine.stats()["proposed_tokens"] == 0
    assert check(run, plain)["prefix_hit_tokens"] > 0


def test_another_model_is_wrong_and_changes_nothing(model, plain, tmp_path):
    write_tiny("llama", tmp_path / "other.gguf", type_name="Q8_0", seed=77)
    with read_gguf(tmp_path / "other.gguf") as gguf:
        other = load_model(gguf, numerics="fast")
    run = driver(model, other)
    assert [tokens_of(events) for events in run.run(*requests())] == plain
    stats = run.engine.stats()
    assert stats["proposed_tokens"] > stats["accepted_tokens"] and not stats["proposer_failures"]


def test_pages_are_planned_for_both(model):
    from oxillama_torch.kernels import kv_formats

    format = kv_formats.find("auto", model.dtype)
    memory = 40 * page_bytes(model.kv_shapes(), 16, format)
    pages = [
        driver(model, draft, kv_pages=None, kv_memory_bytes=memory).engine.stats()["pages"]
        for draft in (None, model)
    ]
    assert pages == [40, 20]


def vocabulary(tokens, types=None) -> dict:
    kinds = types or [1] * len(tokens)
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}


def test_vocabularies_are_compared_token_by_token():
    ours = vocabulary(["a", "b", "c"])
    check_vocabulary(ours, vocabulary(["a", "b", "c"]))
    filled = vocabulary(["a", "b", "c", "[PAD3]"], [1, 1, 1, 5])
    check_vocabulary(ours, filled)
    check_vocabulary(filled, ours)
    with pytest.raises(UnsupportedError, match="token 1 is 'x', the model's is 'b'"):
        check_vocabulary(ours, vocabulary(["a", "x", "c"]))
    with pytest.raises(UnsupportedError, match="4 tokens, the model has 3"):
        check_vocabulary(ours, vocabulary(["a", "b", "c", "d"]))
    with pytest.raises(UnsupportedError, match="2 tokens, the model has 3"):
        check_vocabulary(ours, vocabulary(["a", "b"]))
