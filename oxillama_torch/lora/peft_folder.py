"""Adapters as peft saves them: ``adapter_config.json`` and ``adapter_model.safetensors``.

peft's own class reads the configuration and tells which pattern holds for a module. Options that
change what an adapter computes and that are not built here are refused by name.

N outputs, K inputs, r rank, V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.invalid import invalid_adapter
from oxillama_torch.lora.peft_experts import ExpertReader
from oxillama_torch.lora.peft_tensors import read_modules
from oxillama_torch.lora.terms import LoraTerm, Replacement, Term

__all__ = ["prepare_reading", "read_config", "read_peft_terms"]

# Options that are read here, that only matter when training, or that merely describe.
# fmt: off
_HARMLESS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora",
    "qalora_group_size", "runtime_config", "ensure_weight_tying", "modules_to_save",
    "target_parameters",
})
# fmt: on
# Ways to start that leave the model's own weights alone; PiSSA and its kin subtract from them.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
_MAX_DISTANCE = 0.5  # of two tables over the length of one; Q2_K is some 0.2 away


def prepare_reading() -> None:
    """Import peft now: it takes seconds of this interpreter, in which streams would stand still."""
    import peft  # noqa: F401


def read_peft_terms(name: str, folder: Path, targets: BaseWeights) -> dict[str, Term]:
    """Terms of a peft folder, by tensor of the model.

    Raises:
        RequestError: a file is missing or unsound, or a module is not in the model.
        UnsupportedError: a method, an option or a kind of tensor that is not built.
    """
    targets.check_names()
    config = read_config(name, folder)
    terms: dict[str, Term] = {}
    experts = ExpertReader(name, targets, functools.partial(_scaling, name, config))
    for module, parts in read_modules(name, folder, config.modules_to_save or ()).items():
        if experts.takes(module, parts):
            continue
        stem = targets.stem(module)
        if stem is None:
            raise invalid_adapter(name, f"the model has no linear layer {module!r}")
        if "base" in parts:
            _check_base(name, stem, parts.pop("base"), targets)
        if not parts:
            continue
        if "weight" in parts:
            if len(parts) > 1 + ("bias" in parts):
                raise invalid_adapter(name, f"{module} is both changed and saved whole")
            terms[stem] = _replacement(stem, parts, targets)
        else:
            terms[stem] = _low_rank(name, config, module, stem, parts, targets)
    return terms | experts.terms()


def _low_rank(
    name: str, config: Any, module: str, stem: str, parts: dict[str, Tensor], targets: BaseWeights
) -> LoraTerm:
    embedding = targets.kind(stem) == "embedding"
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = {a, b, *(["magnitude"] if config.use_dora else [])} - parts.keys()
    if missing:
        raise invalid_adapter(name, f"{sorted(missing)[0]} of {module} is missing")
    if "magnitude" in parts and not config.use_dora:
        raise invalid_adapter(name, f"{module} has a magnitude, but use_dora is off")
    scaling = _scaling(name, config, module, parts[a].shape[0])
    magnitude = parts.get("magnitude")
    if embedding:  # peft holds the change of the transposed table
        return LoraTerm(parts[b].T.contiguous(), parts[a].T.contiguous(), scaling, magnitude)
    _check_rows(name, module, parts, targets.shapes[stem])
    return LoraTerm(
        parts[a],
        targets.file_rows(stem, parts[b]),
        scaling,
        None if magnitude is None else targets.file_rows(stem, magnitude),
    )


def _replacement(stem: str, parts: dict[str, Tensor], targets: BaseWeights) -> Replacement:
    shape = tuple(parts["weight"].shape)
    if shape != targets.shapes[stem]:
        return Replacement(parts["weight"])  # refused for its shape in a moment
    bias = parts.get("bias")
    return Replacement(
        targets.file_rows(stem, parts["weight"]),
        None if bias is None else targets.file_rows(stem, bias),
    )


def _check_base(name: str, stem: str, base: Tensor, targets: BaseWeights) -> None:
    """peft saves the model's own embedding and head beside changes of them: is it this model's?

    A coarse quantization is far from what was quantized, another table much farther.
    """
    if tuple(base.shape) != targets.shapes[stem]:
        shapes = f"{tuple(base.shape)}, the model's is {targets.shapes[stem]}"
        raise invalid_adapter(name, f"it was trained on a {stem} of {shapes}")
    error = total = 0.0
    for rows, weight in targets.chunks(stem):
        error += float((weight.cpu() - base[rows]).double().square().sum())
        total += float(base[rows].double().square().sum())
    if error > _MAX_DISTANCE**2 * total:
        raise invalid_adapter(name, f"it was trained on another {stem} than the model's")


def _check_rows(name: str, module: str, parts: dict[str, Tensor], layer: tuple[int, ...]) -> None:
    """Rows may be put into another order before ``Adapter.build`` sees them: all must be there."""
    for part in ("lora_B", "magnitude"):
        if part in parts and len(parts[part]) != layer[0]:
            shape = tuple(parts[part].shape)
            raise invalid_adapter(
                name, f"{part} of {module} is {shape}, the model's {layer} has {layer[0]} outputs"
            )


def read_config(name: str, folder: Path) -> Any:
    """The folder's ``peft.LoraConfig``, with no option that this build would ignore.

    Raises:
        RequestError: it is missing or unsound.
        UnsupportedError: it asks for something that is not built.
    """
    import peft

    path = folder / "adapter_config.json"
    try:
        values = peft.LoraConfig.from_json_file(str(path))
    except FileNotFoundError:
        raise invalid_adapter(name, f"{path} is missing") from None
    except (OSError, TypeError, ValueError) as error:
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
    saved = config.modules_to_save or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise invalid_adapter(name, f"modules_to_save is {saved!r}, not a list of names")
    return config


def _scaling(name: str, config: Any, module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    try:
        key = get_pattern_key(config.alpha_pattern.keys(), module)
        alpha = config.alpha_pattern.get(key, config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
    except (ArithmeticError, AttributeError, TypeError, re.error) as error:
        raise invalid_adapter(name, f"no scaling for {module} of rank {rank}: {error}") from error
