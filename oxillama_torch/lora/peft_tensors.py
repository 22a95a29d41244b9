"""The tensors of a peft folder, sorted by module and by what they are."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.lora.invalid import invalid_adapter

__all__ = ["PREFIX", "WEIGHTS", "read_modules"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "base_layer.weight": "base",
    "weight": "weight",
    "bias": "bias",
}
_DIMENSIONS = {"magnitude": (1,), "bias": (1,), "weight": (1, 2)}


def read_modules(name: str, folder: Path, saved: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Module -> part -> tensor; factors are float32, tensors saved whole have their own dtype.

    Args:
        name: of the adapter, for errors.
        folder: with the file.
        saved: ``modules_to_save`` of the configuration.

    Raises:
        RequestError: the file is missing or unsound.
        UnsupportedError: a tensor of a kind that is not built.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load(name, folder).items():
        module, part = _split(key)
        if part in ("weight", "bias") and not _is_saved(module, saved):
            part = None
        if part is None or not tensor.is_floating_point():
            raise UnsupportedError(f"adapter {name!r}: tensor {key!r} of {tensor.dtype}")
        if tensor.ndim not in _DIMENSIONS.get(part, (2,)):
            raise invalid_adapter(name, f"{key} is {tuple(tensor.shape)}")
        whole = part in ("weight", "base")
        modules.setdefault(module, {})[part] = tensor if whole else tensor.to(torch.float32)
    return modules


def _load(name: str, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            what = f"adapter {name!r}: a pickled adapter_model.bin"
            raise UnsupportedError(what, (WEIGHTS,))
        raise invalid_adapter(name, f"{path} is missing")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise invalid_adapter(name, f"{path} cannot be read: {error}") from error


def _split(key: str) -> tuple[str, str | None]:
    """``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight`` -> (module, ``lora_A``)."""
    for suffix, part in _PARTS.items():
        if key.endswith(f".{suffix}"):
            return key.removesuffix(f".{suffix}").removeprefix(PREFIX), part
    return key, None


def _is_saved(module: str, saved: Collection[str]) -> bool:
    """Is it one of ``modules_to_save``, or inside of one? peft looks at how a path ends."""
    names = module.split(".")
    paths = [".".join(names[:count]) for count in range(1, len(names) + 1)]
    return any(path.endswith(name) for path in paths for name in saved)
