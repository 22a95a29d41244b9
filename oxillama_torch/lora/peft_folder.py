"""Adapters as peft saves them: ``adapter_config.json`` and ``adapter_model.safetensors``.

peft's own class reads the configuration and tells which pattern holds for a module. Options that
change what an adapter computes and that are not built here are refused by name.

N outputs, K inputs, r rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.lora.adapter import LoraTerm, invalid_adapter
from oxillama_torch.lora.targets import Targets

__all__ = ["read_peft_terms"]

# Options that are read here, that only matter when training, or that merely describe.
# fmt: off
_HARMLESS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "modules_to_save",
})
# fmt: on
# Ways to start that leave the model's own weights alone; PiSSA and its kin subtract from them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def read_peft_terms(name: str, folder: Path, targets: Targets) -> dict[str, LoraTerm]:
    """Terms of a peft folder, by tensor of the model.

    Raises:
        RequestError: a file is missing or unsound, or a module is not in the model.
        UnsupportedError: a method, an option or a kind of tensor that is not built.
    """
    config = _config(name, folder)
    terms = {}
    for module, parts in _modules(name, folder).items():
        stem = targets.stem(module)
        if stem is None:
            if module.rpartition(".")[2] in ("lm_head", "embed_tokens"):
                raise UnsupportedError(f"adapter {name!r}: LoRA on {module}")
            raise invalid_adapter(name, f"the model has no linear layer {module!r}")
        missing = {"lora_A", "lora_B", *(["magnitude"] if config.use_dora else [])} - parts.keys()
        if missing:
            raise invalid_adapter(name, f"{sorted(missing)[0]} of {module} is missing")
        if "magnitude" in parts and not config.use_dora:
            raise invalid_adapter(name, f"{module} has a magnitude, but use_dora is off")
        _check_rows(name, module, parts, targets.places[stem].weight.shape[0])
        magnitude = parts.get("magnitude")
        terms[stem] = LoraTerm(
            parts["lora_A"],
            targets.file_rows(stem, parts["lora_B"]),
            _scaling(config, module, parts["lora_A"].shape[0]),
            None if magnitude is None else targets.file_rows(stem, magnitude),
        )
    return terms


def _check_rows(name: str, module: str, parts: dict[str, Tensor], outputs: int) -> None:
    """Rows may be put into another order before ``Adapter.build`` sees them: all must be there."""
    for part in ("lora_B", "magnitude"):
        if part in parts and len(parts[part]) != outputs:
            shape = tuple(parts[part].shape)
            raise invalid_adapter(
                name, f"{part} of {module} is {shape}, the model's layer has {outputs} outputs"
            )


def _config(name: str, folder: Path) -> Any:
    """The folder's ``LoraConfig``, with no option that this build would ignore."""
    import peft

    path = folder / "adapter_config.json"
    try:
        values = peft.LoraConfig.from_json_file(str(path))
    except FileNotFoundError:
        raise invalid_adapter(name, f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise invalid_adapter(name, f"{path} cannot be read: {error}") from error
    method = values.pop("peft_type", None) if isinstance(values, dict) else None
    if method != "LORA":
        raise UnsupportedError(f"adapter {name!r}: peft method {method!r}", ("LORA",))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for those who train
            config = peft.LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"adapter {name!r}: its configuration: {error}") from error
    defaults = peft.LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _HARMLESS and value and value != getattr(defaults, field.name):
            raise UnsupportedError(
                f"adapter {name!r}: {field.name}={json.dumps(value, default=str)}"
            )
    if config.init_lora_weights not in _PLAIN_STARTS:
        start = f"init_lora_weights={config.init_lora_weights!r}, which changes the model itself"
        raise UnsupportedError(f"adapter {name!r}: {start}", map(str, _PLAIN_STARTS))
    if config.modules_to_save:
        saved = ", ".join(sorted(config.modules_to_save))
        raise UnsupportedError(f"adapter {name!r}: modules_to_save ({saved})")
    return config


def _scaling(config: Any, module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(config.alpha_pattern.keys(), module)
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _modules(name: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Module -> part -> float32 tensor."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            what = f"adapter {name!r}: a pickled adapter_model.bin"
            raise UnsupportedError(what, ("adapter_model.safetensors",))
        raise invalid_adapter(name, f"{path} is missing")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise invalid_adapter(name, f"{path} cannot be read: {error}") from error
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = _split(key)
        if part is None or not tensor.is_floating_point():
            raise UnsupportedError(f"adapter {name!r}: tensor {key!r} of {tensor.dtype}")
        if tensor.ndim != (1 if part == "magnitude" else 2):
            raise invalid_adapter(name, f"{key} is {tuple(tensor.shape)}")
        modules.setdefault(module, {})[part] = tensor.to(torch.float32)
    return modules


def _split(key: str) -> tuple[str, str | None]:
    """``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`` -> (module, ``lora_A``)."""
    for suffix, part in _PARTS.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}").removeprefix(_PREFIX), part
    return key, None
