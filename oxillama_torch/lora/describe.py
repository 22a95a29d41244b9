"""What an adapter on disk is, without a model to hold it against."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from oxillama_torch.errors import RequestError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.lora.invalid import invalid_adapter
from oxillama_torch.lora.peft_folder import read_config
from oxillama_torch.lora.peft_tensors import read_modules

__all__ = ["Description", "describe_adapter"]


@dataclass(frozen=True, slots=True)
class Description:
    """An adapter as its files tell.

    Args:
        format: ``peft`` or ``gguf``.
        kind: ``LoRA``, ``rsLoRA``, ``DoRA`` or both.
        base: model or architecture that it was made for, as far as it is named.
        alpha: ``lora_alpha``; patterns may say otherwise for some modules.
        ranks: of the products, ascending.
        targets: last part of a module's name -> how many of them it changes.
        saved: modules that it has whole.
        parameters: numbers in it.
        nbytes: of its tensors.
    """

    format: str
    kind: str
    base: str
    alpha: float
    ranks: tuple[int, ...]
    targets: dict[str, int]
    saved: tuple[str, ...]
    parameters: int
    nbytes: int


def describe_adapter(path: str | os.PathLike[str]) -> Description:
    """Read what an adapter is; of its tensors, names and shapes alone count.

    Raises:
        RequestError, UnsupportedError, GGUFError: as ``read_adapter``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(2, "no such adapter", str(path))
    return _peft(path) if path.is_dir() else _gguf(path)


def _peft(folder: Path) -> Description:
    config = read_config(folder.name, folder)
    modules = read_modules(folder.name, folder, config.modules_to_save or ())
    targets, saved, ranks, tensors = Counter(), [], set(), []
    for module, parts in modules.items():
        name = module.replace(".base_layer", "").rpartition(".")[2]
        factors = {part: t for part, t in parts.items() if part.startswith("lora_")}
        tensors += [tensor for part, tensor in parts.items() if part != "base"]
        if "weight" in parts:
            saved.append(module)
        for part in ("lora_A", "lora_embedding_A"):
            if part in factors:
                targets[name] += 1
                ranks.add(len(factors[part]) if name != "experts" else config.r)
    kind = ("rs" if config.use_rslora else "") + ("DoRA" if config.use_dora else "LoRA")
    return Description(
        "peft",
        kind,
        config.base_model_name_or_path or "not named",
        config.lora_alpha,
        tuple(sorted(ranks)),
        dict(targets),
        tuple(saved),
        sum(tensor.numel() for tensor in tensors),
        sum(tensor.nbytes for tensor in tensors),
    )


def _gguf(path: Path) -> Description:
    with read_gguf(path) as file:
        metadata = Metadata(file.metadata, str(path))
        kind = metadata.get("general.type", str, "model")
        if kind != "adapter":
            raise _no_adapter(path, kind)
        targets, ranks = Counter(), set()
        for tensor, info in file.tensors.items():
            stem, _, part = tensor.rpartition(".weight.")
            if part == "lora_b":
                targets[stem.rpartition(".")[2]] += 1
                ranks.add(info.shape[-1])
        return Description(
            "gguf",
            "LoRA",
            metadata.architecture,
            metadata.get("adapter.lora.alpha", float),
            tuple(sorted(ranks)),
            dict(targets),
            (),
            sum(math.prod(info.shape) for info in file.tensors.values()),
            sum(info.nbytes for info in file.tensors.values()),
        )


def _no_adapter(path: Path, kind: str) -> RequestError:
    return invalid_adapter(path.stem, f"{path} holds a {kind}, not an adapter")
