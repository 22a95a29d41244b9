"""Random adapters made with peft on the tiny HuggingFace models: the oracle of ``lora``.

D hidden size of the tests' models, r rank.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import torch

__all__ = [
    "ALL_LINEAR",
    "ATTENTION",
    "EXPERTS",
    "WHOLE_MODEL",
    "add_adapter",
    "load_by_peft",
    "peft_logits",
    "save_adapter",
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

#: Changes of more than linear layers: (tiny model, options of the adapter).
WHOLE_MODEL = {
    "embedding": ("llama", {"targets": ["embed_tokens"]}),
    "head": ("llama", {"targets": ["lm_head"]}),
    "both": ("qwen3", {"targets": ["embed_tokens", "lm_head", "q_proj"]}),
    "scaled-embedding": ("granite", {"targets": ["embed_tokens", "lm_head"]}),
    "dora": ("llama", {"targets": ["embed_tokens", "lm_head", "k_proj"], "use_dora": True}),
    "rslora": ("llama", {"targets": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "tied-embedding": ("llama-tied", {"targets": ["embed_tokens"]}),
    "tied-head": ("llama-tied", {"targets": ["lm_head"]}),
    "saved": (
        "llama",
        {"targets": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    # k is one of three layers in a product, and llama's files permute its rows
    "saved-linear": ("llama", {"targets": ["q_proj"], "modules_to_save": ["k_proj", "mlp"]}),
    "saved-biases": ("llama-biases", {"targets": ["up_proj"], "modules_to_save": ["self_attn"]}),
    "saved-tied": ("llama-tied", {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "experts": ("qwen3moe", {"targets": ["q_proj"], "target_parameters": EXPERTS}),
    "router": (
        "qwen3moe",
        {"targets": [], "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    ),
    "mixtral": ("mixtral", {"targets": ["v_proj"], "target_parameters": EXPERTS[:1]}),
    "expert-patterns": (
        "mixtral",
        {
            "targets": ["v_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"experts.gate_up_proj": 9},
        },
    ),
}


def save_adapter(
    model: torch.nn.Module, folder: Path, *, seed: int = 0, targets=ALL_LINEAR, **options
) -> peft.PeftModel:
    """Save a random adapter for ``model``; returns peft's model with it, called ``default``.

    Factors are drawn so large that an adapter left out, scaled or permuted wrongly is seen.
    """
    options = {"r": 4, "lora_alpha": 6, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(target_modules=targets, **options)
        )
        _draw(wrapped, "default", seed)
        wrapped.save_pretrained(folder)
    return wrapped.eval()


def add_adapter(wrapped: peft.PeftModel, name: str, folder: Path, *, seed: int, **options) -> None:
    """Add a second random adapter to a peft model and save it to ``folder / name``."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL_LINEAR, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.add_adapter(name, peft.LoraConfig(**options))
        _draw(wrapped, name, seed)
        wrapped.save_pretrained(folder, selected_adapters=[name])
    wrapped.eval()


def load_by_peft(model: torch.nn.Module, folder: Path) -> peft.PeftModel:
    """peft's model with the adapter of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def peft_logits(wrapped: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits float32 [tokens, V]."""
    with torch.no_grad():
        return wrapped(torch.tensor([ids])).logits[0]


def _draw(wrapped: peft.PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in wrapped.named_parameters():
        if f".{name}" not in key:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in key:
            parameter.data *= 1 + 0.2 * noise
        elif "modules_to_save" in key:  # the module's own weights: a copy that has moved on
            parameter.data += 0.3 * parameter.data.std() * noise
        else:
            parameter.data = 0.5 / parameter.shape[-1] ** 0.5 * noise
