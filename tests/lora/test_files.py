"""Adapters and merged models as files.

Oracle: peft loads what is written for it, and its logits are the truth; gguf-py reads the metadata
of merged files.
"""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from adapter_runner import AdapterRunner, assert_close, open_tiny
from paged_runner import PagedRunner
from safetensors.torch import load_file
from tiny_adapters import ALL_LINEAR, WHOLE_MODEL, load_by_peft, peft_logits, save_adapter
from tiny_models import write_tiny

from oxillama_torch.errors import GGUFError, RequestError, UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.gguf.rewrite import NewTensor, rewrite_gguf
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.attach import factor_table
from oxillama_torch.lora.base import BaseFile
from oxillama_torch.lora.describe import describe_adapter
from oxillama_torch.lora.merge_file import merge_file
from oxillama_torch.lora.merged import Merge
from oxillama_torch.lora.write_gguf import write_adapter_gguf
from oxillama_torch.lora.write_peft import write_peft_folder
from oxillama_torch.models.loader import load_model

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()
WEIGHTS = "adapter_model.safetensors"

WRITTEN = {
    "linear": ("llama", {"targets": ALL_LINEAR}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2}}),
    "neox": ("qwen3", {"targets": ["q_proj", "k_proj"]}),
    **{name: WHOLE_MODEL[name] for name in ("both", "scaled-embedding", "tied-head", "experts")},
    "router": WHOLE_MODEL["router"],
    "some-experts": WHOLE_MODEL["mixtral"],
}


@pytest.fixture
def there_and_back(request, tmp_path):
    """(oracle, peft's model, decoder, targets) with the adapter in a.gguf and, from it, in back."""
    arch, options = request.param
    oracle, decoder, targets = open_tiny(arch, tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "a", **options)
    write_adapter_gguf(read_adapter("a", tmp_path / "a", targets), tmp_path / "a.gguf", targets)
    made = read_adapter("a", tmp_path / "a.gguf", targets)
    write_peft_folder(made, tmp_path / "back", targets)
    return oracle, wrapped, decoder, targets


@pytest.mark.parametrize("there_and_back", WRITTEN.values(), ids=WRITTEN, indirect=True)
def test_peft_to_gguf_and_back_changes_no_bit(there_and_back, tmp_path):
    oracle, wrapped, decoder, targets = there_and_back
    before = load_file(tmp_path / "a" / WEIGHTS)
    before = {key: value for key, value in before.items() if "base_layer.weight" not in key}
    after = load_file(tmp_path / "back" / WEIGHTS)
    assert after.keys() == before.keys()
    for key, values in before.items():
        assert torch.equal(after[key], values), key
    write_adapter_gguf(read_adapter("a", tmp_path / "back", targets), tmp_path / "b.gguf", targets)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    expected = peft_logits(wrapped, IDS)
    loaded = load_by_peft(oracle, tmp_path / "back")
    torch.testing.assert_close(peft_logits(loaded, IDS), expected)
    table = factor_table(read_adapter("a", tmp_path / "a.gguf", targets), targets)
    assert_close(AdapterRunner(decoder, targets, {"r": [(table, 1.0)]}).run("r", IDS), expected)


def test_several_alphas_go_into_the_factors(tmp_path):
    """A file has one alpha; llama.cpp's converter would drop the pattern."""
    oracle, decoder, targets = open_tiny("llama", tmp_path)
    options = {"use_rslora": True, "alpha_pattern": {"v_proj": 20, "layers.0.mlp.up_proj": 1}}
    wrapped = save_adapter(oracle, tmp_path / "a", **options)
    write_adapter_gguf(read_adapter("a", tmp_path / "a", targets), tmp_path / "a.gguf", targets)
    table = factor_table(read_adapter("a", tmp_path / "a.gguf", targets), targets)
    runner = AdapterRunner(decoder, targets, {"r": [(table, 1.0)]})
    assert_close(runner.run("r", IDS), peft_logits(wrapped, IDS))


def test_factors_that_gate_and_up_do_not_share_are_put_below_each_other(tmp_path):
    oracle, decoder, targets = open_tiny("mixtral", tmp_path)
    options = {"targets": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    save_adapter(oracle, tmp_path / "a", **options)
    adapter = read_adapter("a", tmp_path / "a", targets)
    adapter.terms["blk.0.ffn_up_exps"].lora_A.data = torch.randn(4, 4, 256) / 16
    write_adapter_gguf(adapter, tmp_path / "a.gguf", targets)
    made = read_adapter("a", tmp_path / "a.gguf", targets)
    write_peft_folder(made, tmp_path / "back", targets)
    loaded = load_by_peft(oracle, tmp_path / "back")
    runner = AdapterRunner(decoder, targets, {"r": [(factor_table(made, targets), 1.0)]})
    assert_close(runner.run("r", IDS), peft_logits(loaded, IDS))


@pytest.mark.parametrize("name", ["dora", "saved"])
def test_what_an_adapter_gguf_cannot_hold_is_named(name, tmp_path):
    arch, options = WHOLE_MODEL[name]
    oracle, _, targets = open_tiny(arch, tmp_path)
    save_adapter(oracle, tmp_path / "a", **options)
    adapter = read_adapter("a", tmp_path / "a", targets)
    with pytest.raises(UnsupportedError, match="an adapter GGUF with .*(DoRA|modules_to_save)"):
        write_adapter_gguf(adapter, tmp_path / "a.gguf", targets)
    with pytest.raises(UnsupportedError, match="writing .* (whole|with a magnitude)"):
        write_peft_folder(adapter, tmp_path / "back", targets)


@pytest.mark.parametrize("name", WHOLE_MODEL)
def test_a_merged_file_gives_the_logits_of_peft(name, tmp_path):
    arch, options = WHOLE_MODEL[name]
    oracle = write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0")
    wrapped = save_adapter(oracle, tmp_path / "a", **options)
    with read_gguf(tmp_path / "tiny.gguf") as file:
        adapter = read_adapter("a", tmp_path / "a", BaseFile(file))
        steps = []
        merges = [Merge(adapter, 1.0, "f32")]
        details = merge_file(file, merges, tmp_path / "new.gguf", lambda *at: steps.append(at))
        assert steps[-1][0] == steps[-1][1] > 0
        assert all(entry.type_after == "F32" and entry.weight_error == 0 for entry in details)
    with read_gguf(tmp_path / "new.gguf") as file:
        assert_close(PagedRunner(load_model(file)).run("r", IDS), peft_logits(wrapped, IDS))


def test_metadata_and_untouched_tensors_are_copied_byte_by_byte(tmp_path):
    oracle = write_tiny("llama", tmp_path / "tiny.gguf", type_name="Q4_0")
    save_adapter(oracle, tmp_path / "a", targets=["v_proj"])
    with read_gguf(tmp_path / "tiny.gguf") as file:
        adapter = read_adapter("a", tmp_path / "a", BaseFile(file))
        details = merge_file(file, [Merge(adapter, 0.5, "same")], tmp_path / "new.gguf")
    assert [entry.name for entry in details] == ["blk.0.attn_v", "blk.1.attn_v"]
    assert all(0.01 < entry.weight_error < 0.2 for entry in details)
    old, new = (gguf.GGUFReader(tmp_path / name) for name in ("tiny.gguf", "new.gguf"))
    fields = [name for name in old.fields if not name.startswith("GGUF.")]
    assert fields == [name for name in new.fields if not name.startswith("GGUF.")]
    for name in fields:
        assert old.fields[name].types == new.fields[name].types
        assert old.fields[name].contents() == new.fields[name].contents()
    assert [t.name for t in old.tensors] == [t.name for t in new.tensors]
    for before, after in zip(old.tensors, new.tensors):
        assert (before.data == after.data).all() == ("attn_v" not in before.name), before.name
        assert before.tensor_type == after.tensor_type
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    write_tiny("llama", tmp_path / "tiny.gguf")
    with read_gguf(tmp_path / "tiny.gguf") as file:
        info = file.tensors["output_norm.weight"]
        short = NewTensor(info.name, info.type, info.shape, lambda: [file.data(info.name)[:-4]])
        with pytest.raises(GGUFError, match="1020 bytes.*1024 bytes"):
            rewrite_gguf(file, tmp_path / "new.gguf", [short])
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf"}


def test_descriptions_need_no_model(tmp_path):
    oracle, _, targets = open_tiny("llama", tmp_path)
    options = {"targets": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "r": 5}
    save_adapter(oracle, tmp_path / "a", use_dora=True, use_rslora=True, **options)
    found = describe_adapter(tmp_path / "a")
    assert (found.format, found.kind, found.alpha, found.ranks) == ("peft", "rsDoRA", 6, (5,))
    assert found.targets == {"q_proj": 2, "down_proj": 2} and found.saved == ("lm_head",)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    save_adapter(oracle, tmp_path / "b", targets=["q_proj", "embed_tokens"])
    write_adapter_gguf(read_adapter("b", tmp_path / "b", targets), tmp_path / "b.gguf", targets)
    found = describe_adapter(tmp_path / "b.gguf")
    assert (found.format, found.base, found.alpha, found.ranks) == ("gguf", "llama", 6, (4,))
    assert found.targets == {"attn_q": 2, "token_embd": 1}
    with pytest.raises(RequestError, match="holds a model, not an adapter"):
        describe_adapter(tmp_path / "tiny.gguf")


def test_the_configuration_written_is_short(tmp_path):
    oracle, _, targets = open_tiny("llama", tmp_path)
    save_adapter(oracle, tmp_path / "a")
    write_peft_folder(read_adapter("a", tmp_path / "a", targets), tmp_path / "b", targets)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 6, {})
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(ALL_LINEAR)
    assert len(config["target_modules"]) == 7
