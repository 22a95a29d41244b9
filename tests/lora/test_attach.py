"""Adapters beside the weights: the whole decoder with adapters, request by request.

Oracle: peft on the HuggingFace model with the weights of the same file. Bitwise tests compare a
request alone with the same one in a mixed batch.
"""

from __future__ import annotations

import pytest
import torch
from adapter_runner import AdapterRunner, assert_close, open_tiny, table_of
from paged_runner import PagedRunner
from tiny_adapters import ALL_LINEAR, ATTENTION, add_adapter, peft_logits, save_adapter

from oxillama_torch.lora.attach import adapter_batch

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()


OPTIONS = {
    "all": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 20, "layers.0.mlp.up_proj": 1},
    },
    # the rows of q and k are permuted in llama's files: each must be caught on its own
    "only-q": {"targets": ["q_proj"]},
    "only-k": {"targets": ["k_proj"]},
    "dora-q": {"targets": ["q_proj"], "use_dora": True},
    "wide": {"r": 33, "targets": ATTENTION},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_logits_equal_peft(arch, options, tmp_path):
    oracle, decoder, targets = open_tiny(arch, tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "adapter", **options)
    table = table_of(tmp_path / "adapter", targets)
    expected = peft_logits(wrapped, IDS)
    assert_close(AdapterRunner(decoder, targets, {"r": [(table, 1.0)]}).run("r", IDS), expected)
    change = (expected - peft_logits(oracle, IDS)).abs().max() / expected.std()
    assert change > 0.05, "the adapter is too small to be seen"


@pytest.mark.parametrize("arch", ["llama-biases", "qwen2", "granite"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_biases_and_scales_equal_peft(arch, dora, tmp_path):
    oracle, decoder, targets = open_tiny(arch, tmp_path, type_name="Q8_0")
    wrapped = save_adapter(oracle, tmp_path / "adapter", use_dora=dora)
    table = table_of(tmp_path / "adapter", targets)
    runner = AdapterRunner(decoder, targets, {"r": [(table, 1.0)]})
    assert_close(runner.run("r", IDS), peft_logits(wrapped, IDS))


def test_attention_adapters_of_a_model_with_experts_equal_peft(tmp_path):
    oracle, decoder, targets = open_tiny("qwen3moe", tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "adapter", targets=ATTENTION)
    table = table_of(tmp_path / "adapter", targets)
    runner = AdapterRunner(decoder, targets, {"r": [(table, 1.0)]})
    assert_close(runner.run("r", IDS), peft_logits(wrapped, IDS))


@pytest.fixture
def two(tmp_path):
    """(peft model with adapters default and second, decoder, targets, their tables)."""
    oracle, decoder, targets = open_tiny("llama", tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "first", seed=1)
    add_adapter(wrapped, "second", tmp_path, seed=2, r=20, target_modules=ALL_LINEAR[:5])
    tables = [table_of(tmp_path / name, targets) for name in ("first", "second")]
    return wrapped, decoder, targets, tables


def test_two_adapters_at_two_scales_equal_peft(two):
    wrapped, decoder, targets, (first, second) = two
    wrapped.base_model.set_adapter(["default", "second"])
    for module in wrapped.modules():
        if hasattr(module, "scale_layer"):
            module.set_scale("default", 0.5)
            if "second" in module.scaling:
                module.set_scale("second", -1.5)
    runner = AdapterRunner(decoder, targets, {"r": [(first, 0.5), (second, -1.5)]})
    assert_close(runner.run("r", IDS), peft_logits(wrapped, IDS))


def test_a_request_has_the_same_bits_alone_and_in_a_mixed_batch(two):
    _, decoder, targets, (first, second) = two
    uses = {
        "one": [(first, 1.0)],
        "both": [(second, 0.7), (first, -0.3)],
        "other": [(second, 1.0)],
        "none": [],
        "same": [(first, 0.25)],
    }
    prompts = {"one": IDS[:30], "both": IDS[3:20], "other": IDS[5:6], "none": IDS[:21]}
    prompts["same"] = IDS[7:30]
    alone = {
        name: AdapterRunner(decoder, targets, uses).run(name, ids) for name, ids in prompts.items()
    }
    assert torch.equal(alone["none"], PagedRunner(decoder).run("none", prompts["none"]))
    runner = AdapterRunner(decoder, targets, uses)
    head = runner.step({name: prompts[name][:13] for name in ("same", "one", "none")})
    tail = runner.step(
        {name: ids[13 if name in head else 0 :] for name, ids in reversed(prompts.items())}
    )
    for name, expected in alone.items():
        got = torch.cat([head[name], tail[name]]) if name in head else tail[name]
        assert torch.equal(got, expected), f"request {name}"


def test_steps_without_adapters_take_the_plain_path(two):
    _, decoder, targets, _ = two
    assert adapter_batch(targets.numbers, [(), ()], [3, 1], targets.device) is None
