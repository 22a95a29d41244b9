"""Random adapters made with peft on the tiny HuggingFace models: the oracle of ``lora``.

D hidden size of the tests' models, r rank.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import torch

__all__ = ["ALL_LINEAR", "ATTENTION", "add_adapter", "peft_logits", "save_adapter"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


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
    wrapped.add_adapter(name, peft.LoraConfig(**options))
    _draw(wrapped, name, seed)
    wrapped.save_pretrained(folder, selected_adapters=[name])
    wrapped.eval()


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
