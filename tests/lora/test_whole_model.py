"""Adapters beyond the linear layers: embedding, head, norms, experts, and tensors saved whole.

Oracle: peft on the HuggingFace model with the weights of the same file.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from adapter_runner import AdapterRunner, assert_close, open_tiny, table_of
from safetensors.torch import load_file, save_file
from tiny_adapters import ATTENTION, EXPERTS, WHOLE_MODEL, peft_logits, save_adapter
from tiny_models import write_tiny

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.lora.adapter import read_adapter

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("case", WHOLE_MODEL.values(), ids=WHOLE_MODEL)
def test_logits_equal_peft(case, tmp_path):
    arch, options = case
    oracle, decoder, targets = open_tiny(arch, tmp_path)
    wrapped = save_adapter(oracle, tmp_path / "adapter", **options)
    table = table_of(tmp_path / "adapter", targets)
    expected = peft_logits(wrapped, IDS)
    assert_close(AdapterRunner(decoder, targets, {"r": [(table, 1.0)]}).run("r", IDS), expected)
    change = (expected - peft_logits(oracle, IDS)).abs().max() / expected.std()
    assert change > 0.05, "the adapter is too small to be seen"


@pytest.mark.parametrize("name", ["dora", "saved", "saved-linear", "experts"])
def test_a_request_has_the_same_bits_alone_and_in_a_mixed_batch(name, tmp_path):
    arch, options = WHOLE_MODEL[name]
    oracle, decoder, targets = open_tiny(arch, tmp_path)
    save_adapter(oracle, tmp_path / "first", seed=1, **options)
    save_adapter(oracle, tmp_path / "second", seed=2, targets=ATTENTION, r=20)
    first, second = (table_of(tmp_path / name, targets) for name in ("first", "second"))
    uses = {"one": [(first, 1.0)], "none": [], "both": [(second, 0.5), (first, -0.25)]}
    uses["same"] = [(first, 0.5)]
    prompts = {"one": IDS[:30], "none": IDS[:21], "both": IDS[3:20], "same": IDS[5:17]}
    alone = {n: AdapterRunner(decoder, targets, uses).run(n, ids) for n, ids in prompts.items()}
    runner = AdapterRunner(decoder, targets, uses)
    head = runner.step({n: prompts[n][:9] for n in ("same", "one", "none")})
    tail = runner.step({n: ids[9 if n in head else 0 :] for n, ids in reversed(prompts.items())})
    for n, expected in alone.items():
        got = torch.cat([head[n], tail[n]]) if n in head else tail[n]
        assert torch.equal(got, expected), f"request {n}"


def test_experts_named_one_by_one_equal_a_fused_parameter(tmp_path):
    """As adapters from before transformers 5 name them; expert 2 is left out, one rank differs."""
    oracle, decoder, targets = open_tiny("mixtral", tmp_path)
    folder = tmp_path / "adapter"
    save_adapter(oracle, folder, targets=["v_proj"], target_parameters=EXPERTS)
    fused = read_adapter("fused", folder, targets)
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: t for name, t in tensors.items() if "experts" not in name}
    old = {"gate": "w1", "up": "w3", "down": "w2"}
    for stem, term in fused.terms.items():
        if match := re.fullmatch(r"blk\.(\d+)\.ffn_(\w+)_exps", stem):
            path = f"base_model.model.model.layers.{match[1]}.block_sparse_moe.experts"
            for expert in (0, 1, 3):
                name = f"{path}.{expert}.{old[match[2]]}"
                tensors[f"{name}.lora_A.weight"] = term.lora_A[expert].clone()
                tensors[f"{name}.lora_B.weight"] = term.lora_B[expert].clone()
    save_file(tensors, folder / WEIGHTS)
    single = read_adapter("single", folder, targets)
    assert single.terms.keys() == fused.terms.keys()
    for stem, term in fused.terms.items():
        if "exps" not in stem:
            continue
        outputs = targets.shapes[stem][1]
        for expert in range(4):
            rows = slice(expert * outputs, (expert + 1) * outputs)
            got, wanted = single.terms[stem].delta(rows), term.delta(rows)
            torch.testing.assert_close(got, wanted * (expert != 2))


def edit(folder, function):
    tensors = load_file(folder / WEIGHTS)
    function(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def test_an_adapter_of_another_table_is_refused(tmp_path):
    """peft saves the embedding it was trained on beside the change of it."""
    oracle, _, targets = open_tiny("llama", tmp_path)
    folder = tmp_path / "adapter"
    save_adapter(oracle, folder, targets=["embed_tokens", "lm_head"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edit(folder, lambda tensors: tensors[key].add_(0.01 * tensors[key].std()))
    read_adapter("near", folder, targets)
    edit(folder, lambda tensors: tensors.update({key: tensors[key].flip(0)}))
    with pytest.raises(RequestError, match="another token_embd than the model's"):
        read_adapter("far", folder, targets)
    edit(folder, lambda tensors: tensors.update({key: torch.zeros(400, 256)}))
    with pytest.raises(RequestError, match=r"\(400, 256\), the model's is \(389, 256\)"):
        read_adapter("larger", folder, targets)


def test_saved_tensors_that_do_not_fit_are_named(tmp_path):
    oracle, _, targets = open_tiny("llama", tmp_path)
    folder = tmp_path / "adapter"
    options = {"targets": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}
    save_adapter(oracle, folder, **options)
    head = "base_model.model.lm_head.weight"
    edit(folder, lambda tensors: tensors.update({head: torch.zeros(400, 256)}))
    with pytest.raises(RequestError, match=r"output is \(400, 256\), .* wants \(389, 256\)"):
        read_adapter("a", folder, targets)
    both = head.replace("weight", "lora_A.weight")
    edit(folder, lambda tensors: tensors.update({both: torch.zeros(4, 256)}))
    with pytest.raises(RequestError, match="lm_head is both changed and saved whole"):
        read_adapter("a", folder, targets)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["modules_to_save"] = ["norm"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="tensor 'base_model.model.lm_head.weight'"):
        read_adapter("a", folder, targets)


def test_a_bias_that_the_model_lacks_is_named(tmp_path):
    _, _, targets = open_tiny("llama", tmp_path)
    biased = write_tiny("llama-biases", tmp_path / "biased.gguf")
    options = {"targets": ["up_proj"], "modules_to_save": ["o_proj"]}
    save_adapter(biased, tmp_path / "adapter", **options)
    with pytest.raises(RequestError, match="attn_output has a bias, the model's has none"):
        read_adapter("a", tmp_path / "adapter", targets)


def test_architectures_whose_rows_are_not_known_are_refused(tmp_path):
    oracle, _, targets = open_tiny("llama", tmp_path)
    save_adapter(oracle, tmp_path / "adapter")
    targets.architecture = "command-r"
    with pytest.raises(UnsupportedError, match="peft adapters for architecture 'command-r'.*llama"):
        read_adapter("a", tmp_path / "adapter", targets)


def test_norms_of_heads_are_refused(tmp_path):
    """They are part of the rotation's kernel, which knows one weight for all requests."""
    oracle, _, targets = open_tiny("qwen3", tmp_path)
    options = {"targets": ["q_proj"], "modules_to_save": ["q_norm"]}
    save_adapter(oracle, tmp_path / "adapter", **options)
    with pytest.raises(RequestError, match="q_norm"):
        read_adapter("a", tmp_path / "adapter", targets)
