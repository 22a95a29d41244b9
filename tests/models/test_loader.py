"""Loading: every tensor is used or named, and nothing that does not fit gets through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_surgery import rewrite
from paged_runner import PagedRunner
from tiny_models import write_tiny

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.layers.linear import Embedding, QuantLinear
from oxillama_torch.layers.moe import MixtureOfExperts
from oxillama_torch.models.config import ModelConfig
from oxillama_torch.models.loader import load_model
from oxillama_torch.models.memory import memory_plan

IDS = list(range(20, 40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama.gguf"
    write_tiny("llama", path)
    return path


def load(path):
    with read_gguf(path) as file:
        return load_model(file)


def logits(decoder):
    return PagedRunner(decoder).run("a", IDS)


@pytest.mark.parametrize(
    "name",
    [
        "token_embd.weight",
        "output_norm.weight",
        "blk.1.attn_k.weight",
        "blk.0.ffn_norm.weight",
        "blk.1.ffn_down.weight",
    ],
)
def test_missing_tensor_is_named(name, tiny, tmp_path):
    path = rewrite(tiny, tmp_path / "bad.gguf", drop=(name,))
    with pytest.raises(GGUFError, match=rf"missing tensor.*'{name}'"):
        load(path)


@pytest.mark.parametrize(
    "name", ["blk.2.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_q.scale", "v.patch"]
)
def test_tensor_without_use_is_named(name, tiny, tmp_path):
    extra = {name: (np.ones((4, 32), np.float32), "F32")}
    with pytest.raises(UnsupportedError, match=rf"'llama' has no use for: {name}"):
        load(rewrite(tiny, tmp_path / "bad.gguf", tensors=extra))


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("blk.0.attn_q.weight", (256, 128), r"\(128, 256\)"),
        ("blk.0.attn_norm.weight", (128,), r"\(256,\)"),
        ("token_embd.weight", (388, 256), r"\(389, 256\)"),
        ("blk.1.ffn_down.weight", (256, 384, 1), r"\(256, 384\)"),
        ("rope_freqs.weight", (32,), r"\(16,\)"),
    ],
)
def test_wrong_shape_shows_both(name, shape, wanted, tiny, tmp_path):
    wrong = {name: (np.ones(shape, np.float32), "F32")}
    path = rewrite(tiny, tmp_path / "bad.gguf", tensors=wrong)
    got = ", ".join(map(str, shape))
    with pytest.raises(GGUFError, match=rf"\({got},?\).*'{name}'.*{wanted}"):
        load(path)


def test_integer_tensor_is_refused(tiny, tmp_path):
    wrong = {"blk.0.attn_norm.weight": (np.ones(256 * 4, np.uint8), "I32")}
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_norm\.weight.*I32"):
        load(rewrite(tiny, tmp_path / "bad.gguf", tensors=wrong))


@pytest.mark.parametrize("type_name", ["F64", "I8", "I16", "I32", "I64"])
def test_types_that_are_only_stored_are_no_weights(type_name, tiny, tmp_path):
    columns = 256 * TYPE_SIZES[GGMLType[type_name]].block_bytes
    wrong = {"blk.0.attn_q.weight": (np.ones((128, columns), np.uint8), type_name)}
    path = rewrite(tiny, tmp_path / "bad.gguf", tensors=wrong)
    with pytest.raises(UnsupportedError, match=rf"blk\.0\.attn_q\.weight.*{type_name}.*Q4_K"):
        load(path)
    with (
        read_gguf(path) as gguf,
        pytest.raises(UnsupportedError, match=rf"blk\.0\.attn_q\.weight.*{type_name}"),
    ):
        memory_plan(gguf, ModelConfig.from_metadata(Metadata(gguf.metadata)), dtype=torch.float32)


def test_unknown_key_is_named(tiny, tmp_path):
    path = rewrite(tiny, tmp_path / "bad.gguf", metadata={"llama.final_logit_softcapping": 30.0})
    with pytest.raises(UnsupportedError, match=r"llama\.final_logit_softcapping"):
        load(path)


def test_qwen2_needs_its_biases(tmp_path):
    write_tiny("qwen2", tmp_path / "whole.gguf")
    path = rewrite(tmp_path / "whole.gguf", tmp_path / "bad.gguf", drop=("blk.1.attn_v.bias",))
    with pytest.raises(GGUFError, match=r"missing tensor.*blk\.1\.attn_v\.bias"):
        load(path)


def test_neighbours_of_one_type_are_one_product_and_others_are_not(tiny, tmp_path):
    with read_gguf(tiny) as file:
        values = file.data("blk.0.attn_v.weight").view(torch.float32).view(64, 256).numpy()
    mixed = {"blk.0.attn_v.weight": (values, "Q8_0")}
    decoder = load(rewrite(tiny, tmp_path / "mixed.gguf", tensors=mixed))
    names = [[list(x.parts) for x in layer.attention.qkv.linears] for layer in decoder.layers]
    assert names == [
        [["blk.0.attn_q", "blk.0.attn_k"], ["blk.0.attn_v"]],
        [["blk.1.attn_q", "blk.1.attn_k", "blk.1.attn_v"]],
    ]
    error = (logits(decoder) - logits(load(tiny))).std()
    assert 0 < error < 0.05


def test_expert_stacks_of_different_types_stay_apart(tmp_path):
    write_tiny("mixtral", tmp_path / "even.gguf")
    name = "blk.0.ffn_up_exps.weight"
    with read_gguf(tmp_path / "even.gguf") as file:
        values = file.data(name).view(torch.float32).view(4, 384, 256).numpy()
    path = rewrite(
        tmp_path / "even.gguf", tmp_path / "mixed.gguf", tensors={name: (values, "Q8_0")}
    )
    mixed, even = load(path), load(tmp_path / "even.gguf")
    assert [len(layer.ffn.gate_up) for layer in mixed.layers] == [2, 1]
    error = (logits(mixed) - logits(even)).std()
    assert 0 < error < 0.05


def test_a_bias_of_one_part_alone_is_used(tiny, tmp_path):
    bias = {"blk.0.attn_k.bias": (np.full(64, 2.0, np.float32), "F32")}
    decoder = load(rewrite(tiny, tmp_path / "bias.gguf", tensors=bias))
    q, k, v = decoder.layers[0].attention.qkv(torch.zeros(1, 256))
    assert (q == 0).all() and (k == 2).all() and (v == 0).all()


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_half_precision_vectors_become_float32(type_name, tiny, tmp_path):
    name = "output_norm.weight"
    with read_gguf(tiny) as file:
        values = file.data(name).view(torch.float32).numpy()
    path = rewrite(tiny, tmp_path / "half.gguf", tensors={name: (values, type_name)})
    norm = load(path).norm.weight
    dtype = torch.float16 if type_name == "F16" else torch.bfloat16
    assert norm.dtype == torch.float32
    assert torch.equal(norm, torch.from_numpy(values.copy()).to(dtype).float())


def test_the_decoder_outlives_the_file(tiny, tmp_path):
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    decoder = load(copy)
    copy.write_bytes(bytes(copy.stat().st_size))
    assert torch.equal(logits(decoder), logits(load(tiny)))


@pytest.mark.parametrize(
    ("arch", "type_name"), [("llama-llama3", "Q8_0"), ("qwen3moe", "F16"), ("qwen2", "Q4_0")]
)
def test_everything_goes_to_the_device(arch, type_name, tmp_path):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name=type_name)
    with read_gguf(tmp_path / "tiny.gguf") as file:
        decoder = load_model(file, device="meta")
    assert decoder.device == torch.device("meta")
    for name, module in decoder.named_modules():
        weights = [module.weight] if isinstance(module, QuantLinear | Embedding) else []
        if isinstance(module, MixtureOfExperts):
            weights = [*module.gate_up, module.down]
        norms = getattr(module, "norms", None) or ()
        tensors = [*(x for x in norms if isinstance(x, torch.Tensor)), *module.buffers()]
        for holder in (*weights, *tensors):
            assert holder.device == decoder.device, name


def test_progress_ends_at_the_total(tiny):
    calls = []
    with read_gguf(tiny) as file:
        load_model(file, progress=lambda done, total: calls.append((done, total)))
        total = sum(info.nbytes for info in file.tensors.values())
        assert len(calls) == len(file.tensors)
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert calls[-1] == (total, total)
