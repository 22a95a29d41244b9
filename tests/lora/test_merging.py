"""Adapters merged into every kind of tensor.

Oracle: peft on the HuggingFace model with the weights of the same file; gguf-py for the rounding of
the types it can encode.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from adapter_runner import assert_close, open_tiny
from gguf.quants import dequantize, quantize
from paged_runner import PagedRunner
from tiny_adapters import WHOLE_MODEL, peft_logits, save_adapter
from tiny_models import write_tiny

from oxillama_torch import LLM
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.lora import registry
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.attach import factor_table
from oxillama_torch.lora.encode import merged_type
from oxillama_torch.lora.merge import Merge, Merger
from oxillama_torch.lora.registry import AdapterRegistry
from oxillama_torch.lora.targets import Targets

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def tensors_of(decoder):
    """Every tensor of a model, and every plane of its packed weights, by reference."""
    found = dict(decoder.named_buffers())
    for name, module in decoder.named_modules():
        for attribute, value in vars(module).items():
            packed = value if isinstance(value, list) else [value]
            for index, tensor in enumerate(packed):
                if isinstance(tensor, PackedTensor):
                    planes = tensor.planes.items()
                    found |= {f"{name}.{attribute}.{index}.{key}": v for key, v in planes}
    return found


@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_merged_logits_equal_peft_and_unmerging_restores_every_byte(name, tmp_path):
    arch, options = WHOLE_MODEL[name]
    oracle, decoder, targets = open_tiny(arch, tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "adapter", **options)
    adapter = read_adapter("a", tmp_path / "adapter", targets)
    before = tensors_of(decoder)
    copies = {key: values.clone() for key, values in before.items()}
    merger = Merger(targets)
    merged, report = merger.prepare([Merge(adapter, 1.0, "f32")])
    merger.swap(merged)
    assert report.tensors == len(adapter.terms)
    assert_close(PagedRunner(decoder).run("r", IDS), peft_logits(wrapped, IDS))
    merger.swap(merger.prepare([])[0])
    after = tensors_of(decoder)
    assert after.keys() == before.keys()
    for key, values in after.items():
        assert values.data_ptr() == before[key].data_ptr() and torch.equal(values, copies[key])


@pytest.mark.parametrize("name", ["both", "saved-linear", "experts", "dora"])
def test_a_scale_counts_alike_attached_and_merged(name, tmp_path):
    arch, options = WHOLE_MODEL[name]
    base = write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0")
    save_adapter(base, tmp_path / "adapter", **options)
    with LLM(tmp_path / "tiny.gguf", device="cpu", kv_pages=16, max_context=64) as llm:
        llm.load_adapter("a", tmp_path / "adapter")
        attached = llm.logits(IDS, adapters=[("a", 0.4)])
        llm.merge_adapter("a", 0.4, merge_dtype="f32")
        assert_close(llm.logits(IDS), attached)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q8_0", "F16", "BF16"])
def test_the_same_type_is_what_gguf_makes_of_the_sums(type_name, tmp_path):
    oracle, decoder, targets = open_tiny("llama", tmp_path, type_name=type_name)
    wrapped = save_adapter(oracle, tmp_path / "adapter", targets=["v_proj", "down_proj"])
    adapter = read_adapter("a", tmp_path / "adapter", targets)
    merger = Merger(targets)
    merged, report = merger.prepare([Merge(adapter, 1.0, "same")])
    assert {entry.type_after for entry in report.details} == {type_name}
    merger.swap(merged)
    model = wrapped.merge_and_unload()
    kind = gguf.GGMLQuantizationType[type_name]
    for layer in range(2):
        exact = model.model.layers[layer].mlp.down_proj.weight.detach().numpy()
        wanted = np.array(dequantize(quantize(exact, kind), kind), np.float32)
        got = decoder.layers[layer].ffn.down.weight.dequantize().numpy()
        # sums that lie on an edge of the rounding may fall to either side
        assert (got != wanted).mean() < 1e-3
        assert np.abs(got - exact).mean() < 1.01 * np.abs(wanted - exact).mean()
        [entry] = [e for e in report.details if e.name == f"blk.{layer}.ffn_down"]
        error = np.linalg.norm(wanted - exact) / np.linalg.norm(exact)
        assert entry.weight_error == pytest.approx(error, rel=0.01)


def test_types_without_an_encoder_become_f16():
    assert merged_type("same", "Q4_K", 256) == "F16"
    assert merged_type("same", "Q8_0", 48) == "F16"
    assert merged_type("same", "Q5_0", 64) == "Q5_0"
    assert merged_type("bf16", "Q4_K", 256) == "BF16"
    with pytest.raises(UnsupportedError, match="merge dtype 'q3'.*f16, bf16, f32, q8_0, same"):
        merged_type("q3", "Q4_K", 256)


def test_merge_and_unload_leaves_a_model_of_its_own(tmp_path):
    base = write_tiny("llama", tmp_path / "tiny.gguf")
    first = save_adapter(base, tmp_path / "first", seed=1, targets=["q_proj", "up_proj"])
    second = save_adapter(first.merge_and_unload(), tmp_path / "second", seed=2, use_dora=True)
    with LLM(tmp_path / "tiny.gguf", device="cpu", kv_pages=16, max_context=64) as llm:
        with pytest.raises(RequestError, match="no adapter is named, and none is merged"):
            llm.merge_and_unload()
        llm.load_adapter("first", tmp_path / "first")
        llm.load_adapter("other", tmp_path / "second")
        marks = [llm.fingerprint]
        llm.merge_adapter("first", merge_dtype="f32")
        marks.append(llm.fingerprint)
        llm.merge_and_unload()
        assert llm.fingerprint == marks[1] != marks[0]
        assert llm.adapters == [] and llm.merging.merged == {}
        with pytest.raises(RequestError, match="'first' is not merged"):
            llm.unmerge_adapter("first")
        # the norms of DoRA are those of the weights that are there now
        llm.load_adapter("second", tmp_path / "second")
        assert_close(llm.logits(IDS, adapters="second"), peft_logits(second, IDS))
        llm.merge_and_unload("second", merge_dtype="f32")
        assert_close(llm.logits(IDS), peft_logits(second, IDS))


def test_an_adapter_loaded_while_the_weights_change_belongs_to_the_new_ones(tmp_path, monkeypatch):
    oracle, decoder, targets = open_tiny("llama", tmp_path)
    save_adapter(oracle, tmp_path / "adapter", use_dora=True)
    loaded, made_for = AdapterRegistry(targets), []

    def slow(adapter, its_targets):
        made_for.append(its_targets)
        if len(made_for) == 1:
            loaded.rebase(Targets(decoder))
        return factor_table(adapter, its_targets)

    monkeypatch.setattr(registry, "factor_table", slow)
    loaded.load("a", tmp_path / "adapter")
    assert made_for == [targets, loaded.targets] and loaded.names() == ["a"]
