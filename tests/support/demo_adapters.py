"""Random peft folders for the demo model, written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["RANK", "write_adapter"]

RANK = 4


def write_adapter(folder: Path, seed: int, hidden: int = 256) -> Path:
    """A random adapter on every attention and feed-forward projection of the demo model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    sizes = {
        "self_attn.q_proj": (hidden, 256), "self_attn.v_proj": (hidden, 128),
        "mlp.gate_proj": (hidden, 768), "mlp.down_proj": (768, hidden),
    }  # fmt: skip
    for layer in range(2):
        for module, (inputs, outputs) in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            a = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
            tensors[f"{stem}.lora_A.weight"] = a
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) / 2
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8,
        "target_modules": [name.rsplit(".", 1)[1] for name in sizes],
        "base_model_name_or_path": "demo",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
