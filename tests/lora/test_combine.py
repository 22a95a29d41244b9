"""Adapters made out of adapters.

Oracle: ``add_weighted_adapter`` of peft on the same adapters.
"""

from __future__ import annotations

import copy

import pytest
import torch
from adapter_runner import AdapterRunner, assert_close, open_tiny
from tiny_adapters import add_adapter, peft_logits, save_adapter
from tiny_models import write_tiny

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.attach import factor_table
from oxillama_torch.lora.combine import combine
from oxillama_torch.lora.targets import Targets
from oxillama_torch.models.loader import load_model

IDS = torch.randint(0, 389, (40,), generator=torch.Generator().manual_seed(1)).tolist()
WEIGHTS = [0.7, -0.4]
CASES = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 3}),
    ("ties", {"density": 0.5}),
    ("ties", {"density": 0.5, "majority_sign_method": "frequency"}),
    ("ties_svd", {"density": 0.3}),
    ("dare_linear", {"density": 0.6}),
    ("dare_linear_svd", {"density": 0.6}),
    ("dare_ties", {"density": 0.6}),
    ("dare_ties_svd", {"density": 0.6}),
    ("dare_ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("svd", {"svd_clamp": 0.9}),
    ("magnitude_prune", {"density": 0.4}),
    ("magnitude_prune_svd", {"density": 0.4}),
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(peft model with two adapters, the same two as we read them, targets).

    A model whose file keeps the order of rows, so that random pruning meets the same elements.
    """
    folder = tmp_path_factory.mktemp("combine")
    oracle = write_tiny("qwen3", folder / "tiny.gguf")
    with read_gguf(folder / "tiny.gguf") as file:
        targets = Targets(load_model(file))
    modules = {"targets": ["q_proj", "v_proj", "embed_tokens", "lm_head"]}
    wrapped = save_adapter(oracle, folder / "default", seed=1, **modules)
    # peft takes the options of the first one over: with rsLoRA there, it would scale twice
    options = {"use_rslora": True, "target_modules": modules["targets"]}
    add_adapter(wrapped, "second", folder, seed=2, **options)
    adapters = [read_adapter(name, folder / name, targets) for name in ("default", "second")]
    return wrapped, adapters, targets


def by_peft(wrapped, kind, **options):
    """peft's model with its own combination as adapter ``new``, drawn with seed 5."""
    wrapped = copy.deepcopy(wrapped)
    inject = wrapped.base_model.inject_adapter

    def inject_and_seed(*arguments):
        inject(*arguments)  # draws first values for the new adapter
        torch.manual_seed(5)

    wrapped.base_model.inject_adapter = inject_and_seed
    wrapped.base_model.add_weighted_adapter(
        ["default", "second"], WEIGHTS, "new", combination_type=kind, **options
    )
    torch.manual_seed(5)
    return wrapped


def modules_of(wrapped):
    """Name in the file -> module of peft."""
    names = {"q_proj": "attn_q", "v_proj": "attn_v", "lm_head": "output"}
    for path, module in wrapped.named_modules():
        *_, last = path.split(".")
        if last == "embed_tokens":
            yield "token_embd", module
        elif hasattr(module, "lora_A"):
            layer = path.split(".")[4] if "layers" in path else None
            yield names[last] if layer is None else f"blk.{layer}.{names[last]}", module


@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=["-".join([kind, *options]) for kind, options in CASES]
)
def test_combinations_equal_those_of_peft(kind, options, qwen):
    wrapped, adapters, targets = qwen
    wrapped = by_peft(wrapped, kind, **options)
    made = combine("new", adapters, WEIGHTS, targets, combination_type=kind, **options)
    modules = dict(modules_of(wrapped))
    assert made.name == "new" and made.path is None and made.terms.keys() == modules.keys()
    for stem, module in modules.items():
        term = made.terms[stem]
        expected = module.get_delta_weight("new").detach()
        torch.testing.assert_close(term.delta(), expected, rtol=1e-4, atol=1e-5)
        if kind.endswith("svd"):
            continue
        if stem == "token_embd":
            factors = module.lora_embedding_B["new"].T, module.lora_embedding_A["new"].T
        else:
            factors = module.lora_A["new"].weight, module.lora_B["new"].weight
        torch.testing.assert_close(term.lora_A, factors[0].detach())
        torch.testing.assert_close(term.lora_B, factors[1].detach())


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_combinations_of_dora_follow_peft(kind, tmp_path):
    oracle, decoder, targets = open_tiny("llama", tmp_path)
    options = {"use_dora": True, "targets": ["q_proj", "up_proj", "embed_tokens"]}
    wrapped = save_adapter(oracle, tmp_path / "default", seed=1, **options)
    options["target_modules"] = options.pop("targets")
    add_adapter(wrapped, "second", tmp_path, seed=2, **options)
    wrapped = by_peft(wrapped, kind)
    wrapped.base_model.set_adapter("new")
    adapters = [read_adapter(name, tmp_path / name, targets) for name in ("default", "second")]
    made = combine("new", adapters, WEIGHTS, targets, combination_type=kind)
    runner = AdapterRunner(decoder, targets, {"r": [(factor_table(made, targets), 1.0)]})
    assert made.uses_dora
    assert_close(runner.run("r", IDS), peft_logits(wrapped, IDS))


def test_one_adapter_is_scaled(qwen):
    _, (first, _), targets = qwen
    made = combine("half", [first], [0.5], targets, combination_type="cat")
    for stem, term in first.terms.items():
        torch.testing.assert_close(made.terms[stem].delta(), 0.5 * term.delta())


def test_what_cannot_be_combined_is_named(qwen, tmp_path):
    _, (first, second), targets = qwen

    def refused(error, message, parts=(first, second), weights=(1.0, 1.0), **options):
        with pytest.raises(error, match=message):
            combine("new", parts, weights, targets, **options)

    refused(UnsupportedError, "combination 'blend'.*dare_ties", combination_type="blend")
    refused(RequestError, "2 adapters and 1 weights", weights=(1.0,))
    refused(RequestError, "not finite", weights=(1.0, float("nan")))
    refused(RequestError, "ties wants a density", combination_type="ties")
    other = combine("cat", [first, second], [1.0, 1.0], targets, combination_type="cat")
    refused(RequestError, "equal ranks, those of token_embd are 4, 8",
            parts=(first, other), combination_type="linear")  # fmt: skip
    refused(RequestError, "svd_clamp is a quantile", svd_clamp=1.5)
    saved = {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}
    save_adapter(write_tiny("qwen3", tmp_path / "x.gguf"), tmp_path / "saved", **saved)
    whole = read_adapter("w", tmp_path / "saved", targets)
    refused(UnsupportedError, "'w', which has whole output", parts=(first, whole))
