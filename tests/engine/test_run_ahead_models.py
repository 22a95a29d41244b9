"""Decoding on lines with a real model and grammars: the bits of the plain path.

Oracle: the same requests in an engine that launches every step kernel by kernel, compared with
``==``, log-probabilities too. Graphs are recorded by ``RecordedCalls``; numerics are invariant.
"""

from __future__ import annotations

import pytest
import torch
from engine_driver import Driver, request_for
from recorded_calls import RecordedCalls
from tiny_models import write_tiny

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import Engine
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.models.loader import load_model
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler
from oxillama_torch.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Faster for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model (with experts), tokenizer and compiler over one tiny file."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny("qwen3moe", path, type_name="Q8_0")
    with read_gguf(path) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf.metadata)
        model = load_model(gguf)
    compiler = ConstraintCompiler(tokenizer)
    yield model, tokenizer, compiler
    compiler.close()


def driver(parts, device=None, **config) -> Driver:
    model, tokenizer, compiler = parts
    config = EngineConfig(**{"page_size": 16, "kv_pages": 64, **config})
    options = {"eos_ids": tokenizer.eos_ids, "constraints": compiler, "graphs": device}
    return Driver(Engine(model, config, banned_ids=frozenset({7}), **options))


def requests(constraints=(None,)):
    generator = torch.Generator().manual_seed(3)
    for index, length in enumerate((1, 5, 15, 16, 17, 33)):
        yield request_for(
            torch.randint(8, 380, (length,), generator=generator).tolist(),
            max_tokens=5 + 3 * index,
            seed=index,
            temperature=0 if index % 2 else 1.0,
            top_p=0.9 if index % 3 else 1.0,
            repetition_penalty=1.2 if index % 3 == 0 else 1.0,
            logprobs=index % 3 if index < 4 else None,
            prompt_logprobs=1 if index == 3 else None,
            constraint=constraints[index % len(constraints)],
        )


@pytest.mark.parametrize("config", [{}, {"max_batch_size": 3, "kv_pages": 9}], ids=str)
def test_bits_are_those_of_the_plain_path(parts, config):
    expected = driver(parts, prefix_cache=False).run(*requests())
    run = driver(parts, RecordedCalls(), **config)
    for cached in (False, True):
        found = run.run(*requests())
        assert [events[1:] for events in found] == [events[1:] for events in expected], cached
        assert found[3][0].logprobs == expected[3][0].logprobs
    assert run.engine.stats()["steps_ahead"] > 20


def test_grammars_are_masked_on_the_device(parts):
    constraints = (
        Constraint("regex", r"(ab|c)+[0-9]{2,5}\."),
        None,
        Constraint.choice(["the logits of all", "none", "nothing of it"]),
    )
    expected = driver(parts).run(*requests(constraints))
    run = driver(parts, RecordedCalls())
    assert run.run(*requests(constraints)) == expected
    stats = run.engine.stats()
    assert stats["graph_steps"] > 5 and stats["sampled_by_op"] > 10
