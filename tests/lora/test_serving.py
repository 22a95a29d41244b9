"""Adapters in the engine: per request, replaced under load, merged between steps.

Oracle: peft on the HuggingFace model with the weights of the same file; gguf-py for the rounding of
merged weights.
"""

from __future__ import annotations

import copy
import math
import threading

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tiny_adapters import peft_logits, save_adapter
from tiny_models import write_tiny

from oxillama_torch import LLM, SamplingParams
from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.errors import CapacityError, EngineError, RequestError, UnsupportedError

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def oracles(folder):
    """Name -> HuggingFace or peft model; the adapters lie in ``folder / name``."""
    base = write_tiny("llama", folder / "tiny.gguf", type_name="Q8_0")
    return {
        None: base,
        "a": save_adapter(base, folder / "a", seed=1),
        "b": save_adapter(base, folder / "b", seed=2, r=9, targets=["q_proj", "up_proj"]),
        "dora": save_adapter(base, folder / "dora", seed=3, use_dora=True),
    }


@pytest.fixture(scope="module")
def shared(folder, oracles):
    with LLM(folder / "tiny.gguf", device="cpu", max_batch_size=8, kv_pages=64) as llm:
        yield llm


@pytest.fixture
def llm(shared, folder):
    """An LLM with all adapters loaded and none merged."""
    for name in ("a", "b", "dora"):
        shared.load_adapter(name, folder / name)
    yield shared
    for name in list(shared.merging.merged):
        shared.unmerge_adapter(name)


def assert_close(got, wanted, tolerance):
    error = (got - wanted).abs().max() / wanted.std()
    assert error < tolerance, f"logits differ by {error:.1e} standard deviations"


def weights_of(llm):
    """Every tensor of the model's linear layers, by reference."""
    return {
        (name, plane): values
        for name, module in llm.engine._engine.model.named_modules()
        if hasattr(module, "parts")
        for plane, values in module.weight.planes.items()
    }


def test_the_prefix_cache_never_mixes_adapters(llm, oracles, folder):
    """One after the other on the same prompt: each finds only pages of its own kind."""
    for _ in range(2):
        for name, oracle in oracles.items():
            expected = peft_logits(oracle, IDS)
            assert_close(llm.logits(IDS, adapters=name), expected, 1e-4)
            assert_close(llm.logits(IDS + [5], adapters=name)[:-1], expected, 1e-4)
            first = int(expected[-1].argmax())
            [found] = llm.generate(IDS, GREEDY, adapters=name)
            assert found.token_ids[0] == first
    assert found.cached_tokens == 32, "the same adapter finds its own pages"
    # other scales and other files of the same name are others too
    whole = llm.generate(IDS, GREEDY, adapters="a")[0]
    half = llm.generate(IDS, GREEDY, adapters=[("a", 0.5)])[0]
    assert (whole.cached_tokens, half.cached_tokens) == (32, 0)
    llm.load_adapter("a", folder / "b")
    replaced = llm.generate(IDS, GREEDY, adapters="a")[0]
    assert replaced.token_ids == llm.generate(IDS, GREEDY, adapters="b")[0].token_ids
    assert llm.generate(IDS, GREEDY, adapters=[("a", 0.0)])[0].cached_tokens == 32


def test_adapters_of_one_batch_give_the_tokens_they_give_alone(llm):
    choices = [None, "a", "b", [("b", 0.5), ("a", -1.0)], "dora", [("a", 1.0), ("b", 1.0)]]
    prompts = [IDS[i : i + 17] for i in range(len(choices))]
    alone = [llm.generate(p, GREEDY, adapters=c)[0] for p, c in zip(prompts, choices)]
    handles = [
        llm.engine.submit(
            GenerationRequest(
                prompt_token_ids=tuple(prompt),
                params=SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0),
                adapters=llm._pairs(choice),
                cache_salt="together",
            )
        )
        for prompt, choice in zip(prompts, choices)
    ]
    for handle, expected in zip(handles, alone):
        tokens = [e.token_id for e in handle.events() if hasattr(e, "token_id")]
        assert tokens == expected.token_ids


def test_bad_adapters_are_refused_at_once(llm):
    with pytest.raises(RequestError, match="'pirate' is not loaded; loaded: a, b, dora") as caught:
        llm.generate(IDS, GREEDY, adapters="pirate")
    assert (caught.value.status, caught.value.code) == (404, "adapter_not_found")
    for scale in (math.nan, math.inf):
        with pytest.raises(RequestError, match="scale of adapter 'a'") as caught:
            llm.generate(IDS, GREEDY, adapters=[("a", scale)])
        assert caught.value.status == 400
    with pytest.raises(RequestError, match="named twice"):
        llm.generate(IDS, GREEDY, adapters=[("a", 1.0), ("a", 0.5)])


def test_replacing_and_dropping_under_load_loses_no_token(llm, folder):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    versions = ["a", "b", "dora"]
    expected = {v: llm.generate(IDS[:9], params, adapters=v)[0].token_ids for v in versions}
    llm.load_adapter("hot", folder / "a")
    results, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            results.append(llm.generate(IDS[:9], params, adapters="hot")[0].token_ids)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for index in range(9):
        llm.load_adapter("hot", folder / versions[index % 3])
        llm.load_adapter("other", folder / "b")
        llm.unload_adapter("other")
    stop.set()
    for thread in threads:
        thread.join()
    llm.unload_adapter("hot")
    assert len(results) >= 3
    assert all(tokens in expected.values() for tokens in results)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("f16", 1e-4), ("q8_0", 1e-3)])
@pytest.mark.parametrize("name", ["a", "b", "dora"])
def test_merged_logits_equal_peft_and_unmerging_restores_every_byte(
    llm, oracles, name, dtype, tolerance
):
    expected = peft_logits(merged_by_peft(oracles[name], dtype), IDS)
    before = weights_of(llm)
    copies = {key: values.clone() for key, values in before.items()}
    report = llm.merge_adapter(name, merge_dtype=dtype)
    merged = llm.logits(IDS)
    assert_close(merged, expected, tolerance)
    exact = peft_logits(oracles[name], IDS)
    cost = float((merged - exact).square().mean().sqrt() / exact.std())
    assert cost < {"f32": 1e-4, "f16": 2e-3, "q8_0": 5e-2}[dtype], f"encoding costs {cost:.1e}"
    assert report.tensors == (4 if name == "b" else 14)
    assert report.weight_error < {"f32": 1e-9, "f16": 4e-4, "q8_0": 1e-2}[dtype]
    assert report.change_error >= report.weight_error
    with llm.disable_adapter():
        assert_close(llm.logits(IDS, adapters=name), peft_logits(oracles[None], IDS), 1e-4)
        with pytest.raises(RequestError, match="disabled"):
            llm.unmerge_adapter(name)
    assert torch.equal(llm.logits(IDS), merged)
    llm.unmerge_adapter(name)
    after = weights_of(llm)
    assert after.keys() == before.keys()
    for key, values in after.items():
        assert values is before[key] and torch.equal(values, copies[key])
    assert_close(llm.logits(IDS), peft_logits(oracles[None], IDS), 1e-4)


def merged_by_peft(wrapped, dtype):
    """The model after peft's ``merge_and_unload``, its changed weights rounded by gguf-py."""
    touched = {
        name for name, module in wrapped.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }  # fmt: skip
    model = copy.deepcopy(wrapped).merge_and_unload()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    for name in touched:
        weight = model.get_submodule(name).weight
        rounded = dequantize(quantize(weight.detach().numpy(), kind), kind)
        weight.data = torch.from_numpy(np.array(rounded, np.float32))
    return model


def test_merged_and_attached_adapters_add_up(llm):
    both = llm.logits(IDS, adapters=[("a", 0.5), ("b", 1.0)])
    llm.merge_adapter("a", 0.5, merge_dtype="f32")
    assert_close(llm.logits(IDS, adapters="b"), both, 1e-4)
    llm.merge_adapter("b", merge_dtype="f32")
    assert_close(llm.logits(IDS), both, 1e-4)
    llm.unmerge_adapter("a")
    only = llm.logits(IDS)
    llm.unmerge_adapter("b")
    assert_close(only, llm.logits(IDS, adapters="b"), 1e-4)


def test_products_that_are_taken_apart_keep_their_biases(tmp_path):
    """q, k and v of qwen2 have biases and are one product; only k and v are merged."""
    base = write_tiny("qwen2", tmp_path / "tiny.gguf", type_name="Q8_0")
    options = {"targets": ["k_proj", "v_proj", "down_proj"], "use_dora": True}
    wrapped = save_adapter(base, tmp_path / "adapter", **options)
    with LLM(tmp_path / "tiny.gguf", device="cpu", kv_pages=16, max_context=64) as llm:
        llm.load_adapter("a", tmp_path / "adapter")
        attached = llm.logits(IDS, adapters="a")
        llm.merge_adapter("a", merge_dtype="f32")
        assert_close(llm.logits(IDS), peft_logits(wrapped, IDS), 1e-4)
    assert_close(attached, peft_logits(wrapped, IDS), 1e-4)


def test_merging_says_what_cannot_be(llm):
    llm.merge_adapter("b")
    with pytest.raises(RequestError, match="'b' is merged already"):
        llm.merge_adapter("b")
    with pytest.raises(RequestError, match="unmerge it first"):
        llm.unload_adapter("b")
    with pytest.raises(RequestError, match="'a' is not merged"):
        llm.unmerge_adapter("a")
    with pytest.raises(UnsupportedError, match="merge dtype 'q4_k'.*f16, f32, q8_0"):
        llm.merge_adapter("a", merge_dtype="q4_k")
    with pytest.raises(RequestError, match="'x' is not loaded"):
        llm.merge_adapter("x")


def test_a_call_runs_between_steps_and_brings_back_what_it_raises(llm):
    assert llm.engine.call(lambda engine: engine.max_context) == llm.engine.max_context

    def fail(engine):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        llm.engine.call(fail)
    assert llm.engine.alive


def test_the_budget_puts_away_what_was_used_longest_ago(folder, oracles):
    with LLM(folder / "tiny.gguf", device="cpu", kv_pages=16, max_context=64) as free:
        free.load_adapter("a", folder / "a")
        size = free.engine.adapters.get("a").nbytes
    options = {"adapter_memory_bytes": int(2.5 * size), "kv_pages": 16, "max_context": 64}
    with LLM(folder / "tiny.gguf", device="cpu", **options) as llm:
        for name in "xyz":
            llm.load_adapter(name, folder / "a")
        entries = llm.engine.adapters._entries
        assert [name for name, entry in entries.items() if entry.loaded is None] == ["x"]
        assert llm.adapters == ["x", "y", "z"]
        assert_close(llm.logits(IDS, adapters="x"), peft_logits(oracles["a"], IDS), 1e-4)
        assert [name for name, entry in entries.items() if entry.loaded is None] == ["y"]
        llm.engine.adapters.load("x", folder / "a", pinned=True)
        llm.engine.adapters.load("z", folder / "a", pinned=True)
        with pytest.raises(CapacityError, match="pinned"):
            llm.load_adapter("w", folder / "a")
    with pytest.raises(EngineError):
        llm.engine.call(lambda engine: None)
