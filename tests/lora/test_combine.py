"""Adapters made out of adapters.

Oracle: ``add_weighted_adapter`` of peft on the same adapters.
"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_adapters import add_adapter, save_adapter
from tiny_models import write_tiny

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.lora.adapter import read_adapter
from oxillama_torch.lora.combine import combine
from oxillama_torch.lora.targets import Targets
from oxillama_torch.models.loader import load_model

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
    modules = {"targets": ["q_proj", "v_proj"]}
    wrapped = save_adapter(oracle, folder / "default", seed=1, **modules)
    # peft takes the options of the first one over: with rsLoRA there, it would scale twice
    options = {"use_rslora": True, "target_modules": modules["targets"]}
    add_adapter(wrapped, "second", folder, seed=2, **options)
    adapters = [read_adapter(name, folder / name, targets) for name in ("default", "second")]
    return wrapped, adapters, targets


@pytest.mark.parametrize(
    ("kind", "options"), CASES, ids=[f"{kind}-{len(options)}" for kind, options in CASES]
)
def test_combinations_equal_those_of_peft(kind, options, qwen):
    wrapped, adapters, targets = qwen
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
    made = combine("new", adapters, WEIGHTS, targets, combination_type=kind, **options)
    assert made.name == "new" and made.path is None and len(made.terms) == 4
    for name, module in wrapped.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, letter = name.split(".")[4], name.split(".")[-1][0]
        term = made.terms[f"blk.{layer}.attn_{letter}"]
        expected = module.get_delta_weight("new").detach()
        torch.testing.assert_close(term.delta(), expected, rtol=1e-4, atol=1e-5)
        if not kind.endswith("svd"):
            torch.testing.assert_close(term.lora_A, module.lora_A["new"].weight.detach())
            torch.testing.assert_close(term.lora_B, module.lora_B["new"].weight.detach())


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
    refused(RequestError, "equal ranks, those of blk.0.attn_q are 4, 8",
            parts=(first, other), combination_type="linear")  # fmt: skip
    save_adapter(write_tiny("qwen3", tmp_path / "x.gguf"), tmp_path / "dora", use_dora=True)
    dora = read_adapter("d", tmp_path / "dora", targets)
    refused(UnsupportedError, "'d', which has magnitudes", parts=(first, dora))
