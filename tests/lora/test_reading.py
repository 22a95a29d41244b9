"""Reading adapters: peft folders, adapter GGUFs, and files that are not what they should be.

Oracle: what peft saved, and gguf-py's writer for GGUF.
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_adapters import ALL_LINEAR, save_adapter
from tiny_models import write_tiny

from oxillama_torch.errors import GGUFError, RequestError, UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.targets import Targets
from oxillama_torch.models.loader import load_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(transformers model, targets of ours)."""
    path = tmp_path_factory.mktemp("reading") / "tiny.gguf"
    oracle = write_tiny("llama", path)
    with read_gguf(path) as file:
        return oracle, Targets(load_model(file))


@pytest.fixture
def folder(llama, tmp_path):
    save_adapter(llama[0], tmp_path / "adapter", targets=["q_proj", "down_proj"])
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def edit_tensors(folder, function):
    tensors = load_file(folder / WEIGHTS)
    function(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def write_adapter(path, terms, *, alpha=6.0, architecture="llama", **metadata):
    """An adapter GGUF by gguf-py, as llama.cpp's converter writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    for stem, (a, b) in terms.items():
        writer.add_tensor(f"{stem}.weight.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{stem}.weight.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_adapter_gguf_equals_the_peft_folder(llama, tmp_path):
    oracle, targets = llama
    wrapped = save_adapter(oracle, tmp_path / "adapter", targets=ALL_LINEAR)
    names = dict(zip(ALL_LINEAR, ["attn_q", "attn_k", "attn_v", "attn_output"]))
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    terms = {}
    for name, module in wrapped.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, kind = name.split(".")[4], name.split(".")[-1]
        a, b = (getattr(module, f"lora_{x}")["default"].weight.detach().numpy() for x in "AB")
        if kind in ("q_proj", "k_proj"):  # as the converter permutes: see tiny_models
            heads = 4 if kind == "q_proj" else 2
            b = b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
        terms[f"blk.{layer}.{names[kind]}"] = (a, b)
    write_adapter(tmp_path / "adapter.gguf", terms)
    one = read_adapter("one", tmp_path / "adapter", targets)
    other = read_adapter("other", tmp_path / "adapter.gguf", targets)
    assert list(one.terms) == list(other.terms) and len(one.terms) == 14
    for stem, term in one.terms.items():
        assert torch.equal(term.lora_A, other.terms[stem].lora_A), stem
        assert torch.equal(term.lora_B, other.terms[stem].lora_B), stem
        assert term.scaling == other.terms[stem].scaling == 1.5
    assert one.digest == other.digest and one.nbytes == other.nbytes


def test_the_digest_tells_contents_apart(llama, folder):
    _, targets = llama
    first = read_adapter("a", folder, targets)
    assert read_adapter("b", folder, targets).digest == first.digest
    edit_config(folder, lora_alpha=7)
    second = read_adapter("a", folder, targets)
    edit_tensors(folder, lambda tensors: next(iter(tensors.values())).add_(1e-3))
    assert len({first.digest, second.digest, read_adapter("a", folder, targets).digest}) == 3


UNSUPPORTED = {
    "method": ({"peft_type": "LOHA"}, "peft method 'LOHA'"),
    "bias": ({"bias": "all"}, 'bias="all"'),
    "lora_bias": ({"lora_bias": True}, "lora_bias=true"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "replication": ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa"}, "'pissa', which changes the model itself"),
    "unknown": ({"use_hyper_lora": True}, "use_hyper_lora"),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_options_that_are_not_built_are_named(changes, message, llama, folder):
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedError, match=message):
        read_adapter("a", folder, llama[1])


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def rename(old, new):
    def change(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def set_to(key, value):
    return lambda tensors: tensors.update({key: value})


BROKEN = {
    "layer": (
        rename("layers.1", "layers.7"),
        "no linear layer .model.layers.7",
    ),
    "half": (lambda tensors: tensors.pop(KEY.format("B")), "lora_B of .*q_proj is missing"),
    "inputs": (
        set_to(KEY.format("A"), torch.zeros(4, 99)),
        r"lora_A of blk.1.attn_q is \(4, 99\), the model's \(128, 256\) wants \(4, 256\)",
    ),
    "outputs": (
        set_to(KEY.format("B"), torch.zeros(96, 4)),
        r"lora_B of .*q_proj is \(96, 4\), the model's \(128, 256\) has 128 outputs",
    ),
    "ranks": (
        set_to(KEY.format("B"), torch.zeros(128, 5)),
        r"lora_B of blk.1.attn_q is \(128, 5\), .* wants \(128, 4\)",
    ),
    "nan": (set_to(KEY.format("A"), torch.full((4, 256), float("nan"))), "not finite"),
    "vector": (set_to(KEY.format("A"), torch.zeros(256)), r"lora_A.weight is \(256,\)"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_tensors_that_do_not_fit_are_named(change, message, llama, folder):
    edit_tensors(folder, change)
    with pytest.raises(RequestError, match=message) as caught:
        read_adapter("a", folder, llama[1])
    assert (caught.value.status, caught.value.code) == (400, "invalid_adapter")


ODD = {
    "alpha": ({"lora_alpha": "much"}, "no scaling for .* of rank 4"),
    "nan": ({"lora_alpha": float("nan")}, "has rank 4 and scaling nan"),
    "pattern": ({"alpha_pattern": {"(": 3}}, "no scaling for"),
    "list": ({"alpha_pattern": [3]}, "no scaling for"),
    "saved": ({"modules_to_save": {"lm_head": 1}}, "modules_to_save is .* not a list of names"),
}


@pytest.mark.parametrize(("changes", "message"), ODD.values(), ids=ODD)
def test_odd_values_are_refused(changes, message, llama, folder):
    edit_config(folder, **changes)
    with pytest.raises(RequestError, match=message):
        read_adapter("a", folder, llama[1])


def test_no_rank_is_refused(llama, folder):
    def empty(tensors):
        for key in list(tensors):
            shape = list(tensors[key].shape)
            shape["lora_B" in key] = 0
            tensors[key] = torch.zeros(shape)

    edit_tensors(folder, empty)
    with pytest.raises(RequestError, match="of rank 0"):
        read_adapter("a", folder, llama[1])


def test_tensors_of_another_kind_are_named(llama, folder):
    edit_tensors(folder, set_to("base_model.model.model.norm.weight", torch.zeros(256)))
    with pytest.raises(UnsupportedError, match="tensor 'base_model.model.model.norm.weight'"):
        read_adapter("a", folder, llama[1])


def test_files_that_are_missing_or_unsound_are_named(llama, folder, tmp_path):
    targets = llama[1]
    with pytest.raises(RequestError, match="there is nothing at"):
        read_adapter("a", tmp_path / "nowhere", targets)
    with pytest.raises(RequestError, match="cannot be called ''"):
        read_adapter("", folder, targets)
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    with pytest.raises(RequestError, match="adapter_model.safetensors cannot be read"):
        read_adapter("a", folder, targets)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="pickled"):
        read_adapter("a", folder, targets)
    for text in ("[1", "5", "null"):
        (folder / CONFIG).write_text(text)
        with pytest.raises(RequestError, match="adapter_config.json cannot be read"):
            read_adapter("a", folder, targets)
    (folder / CONFIG).unlink()
    with pytest.raises(RequestError, match="adapter_config.json is missing"):
        read_adapter("a", folder, targets)
    (tmp_path / "junk.gguf").write_bytes(b"GGUFjunk")
    with pytest.raises(GGUFError):
        read_adapter("a", tmp_path / "junk.gguf", targets)


def zeros(*shape):
    return np.zeros(shape, np.float32)


def test_adapter_ggufs_for_something_else_are_refused(llama, tmp_path):
    targets, path = llama[1], tmp_path / "a.gguf"
    good = {"blk.0.attn_q": (zeros(4, 256), zeros(128, 4))}

    def refused(error, message, terms=good, **options):
        write_adapter(path, terms, **options)
        with pytest.raises(error, match=message):
            read_adapter("a", path, targets)

    refused(RequestError, "made for 'qwen2', the model is 'llama'", architecture="qwen2")
    refused(UnsupportedError, "alora", adapter__alora__invocation_tokens="x")
    experts = {"blk.0.ffn_up_exps": good["blk.0.attn_q"]}
    refused(RequestError, "no linear layer for 'blk.0.ffn_up_exps.weight.lora_a'", experts)
    ranks = {"blk.0.attn_q": (zeros(4, 256), zeros(128, 8))}
    refused(RequestError, r"ranks of blk.0.attn_q differ: \(4, 256\) and \(128, 8\)", ranks)
    shape = {"blk.0.attn_q": (zeros(4, 128), zeros(128, 4))}
    refused(RequestError, r"is \(4, 128\), the model's \(128, 256\) wants \(4, 256\)", shape)
    write_tiny("llama", path)
    with pytest.raises(RequestError, match="holds a model, not an adapter"):
        read_adapter("a", path, targets)
