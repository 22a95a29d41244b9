"""Adapters as GGUF files, as llama.cpp's ``convert_lora_to_gguf.py`` writes them.

Two tensors for each weight, ``blk.0.attn_q.weight.lora_a`` [r, K] and ``.lora_b`` [N, r], whose
rows are in the file's order already; scaling = ``adapter.lora.alpha`` / r. Those of a stack of
experts are [E, r, K] and [E, N, r], those of the embedding (V, D) are [V, r] and [D, r].
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile, read_gguf
from oxillama_torch.kernels import formats
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.invalid import invalid_adapter
from oxillama_torch.lora.terms import LoraTerm

__all__ = ["read_gguf_terms"]

# Both describe; the second is what the adapter was trained to see first, and the user's to add.
_KEYS = {"adapter.type", "adapter.lora.alpha", "adapter.lora.task_name"}
_KEYS |= {"adapter.lora.prompt_prefix"}


def read_gguf_terms(name: str, path: Path, targets: BaseWeights) -> dict[str, LoraTerm]:
    """Terms of an adapter GGUF, by tensor of the model.

    Raises:
        GGUFError: the file is malformed.
        RequestError: it is no adapter for this model.
        UnsupportedError: it is an adapter of another kind.
    """
    with read_gguf(path) as file:
        alpha = _alpha(name, file, targets)
        pairs: dict[str, dict[str, Tensor]] = {}
        for tensor, info in file.tensors.items():
            stem, _, part = tensor.rpartition(".weight.")
            if part not in ("lora_a", "lora_b") or len(info.shape) not in (2, 3):
                raise UnsupportedError(f"adapter {name!r}: tensor {tensor!r}")
            if stem not in targets.shapes:
                raise invalid_adapter(name, f"the model has no linear layer for {tensor!r}")
            values = formats.dequantize(info.type, file.data(tensor)).view(info.shape)
            pairs.setdefault(stem, {})[part] = values
    return {stem: _term(name, stem, pair, alpha, targets) for stem, pair in pairs.items()}


def _term(
    name: str, stem: str, pair: dict[str, Tensor], alpha: float, targets: BaseWeights
) -> LoraTerm:
    missing = {"lora_a", "lora_b"} - pair.keys()
    if missing:
        raise invalid_adapter(name, f"{stem}.weight.{missing.pop()} is missing")
    a, b = pair["lora_a"], pair["lora_b"]
    if targets.kind(stem) == "embedding":
        a, b = b.transpose(-2, -1).contiguous(), a
    rank = a.shape[-2]
    if rank == 0 or b.shape[-1] != rank:
        shapes = [tuple(pair[part].shape) for part in ("lora_a", "lora_b")]
        raise invalid_adapter(name, f"the ranks of {stem} differ: {shapes[0]} and {shapes[1]}")
    # llama.cpp takes 1 where the file says 0
    return LoraTerm(a, b, alpha / rank if alpha else 1.0)


def _alpha(name: str, file: GGUFFile, targets: BaseWeights) -> float:
    """``adapter.lora.alpha`` of a file that is a LoRA for this architecture."""
    metadata = Metadata(file.metadata, str(file.path))
    kind = metadata.get("general.type", str, "model")
    if kind != "adapter":
        raise invalid_adapter(name, f"{file.path} holds a {kind}, not an adapter")
    if metadata.get("adapter.type", str) != "lora":
        raise UnsupportedError(f"adapter type {metadata['adapter.type']!r}", ("lora",))
    if metadata.architecture != targets.architecture:
        made_for = f"made for {metadata.architecture!r}"
        raise invalid_adapter(name, f"{made_for}, the model is {targets.architecture!r}")
    unknown = sorted(k for k in metadata if k.startswith("adapter.") and k not in _KEYS)
    if unknown:
        raise UnsupportedError(f"adapter {name!r}: key {unknown[0]!r}")
    alpha = metadata.get("adapter.lora.alpha", float)
    assert math.isfinite(alpha), "Metadata.get lets finite numbers pass only"
    return alpha
