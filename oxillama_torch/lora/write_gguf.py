"""Adapters written as GGUF files, as llama.cpp's ``convert_lora_to_gguf.py`` writes them.

See ``adapter_gguf`` for the layout.
"""

from __future__ import annotations

import os
from collections import Counter

import numpy as np

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.writer import write_gguf
from oxillama_torch.lora.adapter import Adapter
from oxillama_torch.lora.base import BaseWeights
from oxillama_torch.lora.terms import LoraTerm, Replacement

__all__ = ["alpha_of", "write_adapter_gguf"]

_ALL_F32 = 0  # LLAMA_FTYPE_ALL_F32


def write_adapter_gguf(adapter: Adapter, path: str | os.PathLike[str], base: BaseWeights) -> None:
    """Write an adapter as a GGUF file that llama.cpp and this package read, in F32.

    A file has one alpha for all tensors, and scaling = alpha / rank: where an adapter has several,
    the most frequent one is written and the factors of the others are multiplied to match.

    Args:
        adapter: only low-rank changes without magnitudes have a place in such a file.
        base: the model it was read for.

    Raises:
        UnsupportedError: it has something else; gguf-py is not installed.
    """
    terms = {stem: _checked(adapter, stem) for stem in adapter.terms}
    alphas = Counter(alpha_of(term) for term in terms.values())
    [(alpha, _)] = alphas.most_common(1)
    metadata = {
        "general.architecture": base.architecture,
        "general.type": "adapter",
        "general.name": adapter.name,
        "general.file_type": _ALL_F32,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    tensors = {}
    for stem, term in terms.items():
        a, b = term.lora_A, term.lora_B
        if alpha_of(term) != alpha:
            b = b * (alpha_of(term) / alpha)
        if base.kind(stem) == "embedding":
            a, b = b, a.T
        for part, values in (("lora_a", a), ("lora_b", b)):
            tensors[f"{stem}.weight.{part}"] = (values.contiguous().numpy(), "F32")
    write_gguf(path, metadata, tensors)


def alpha_of(term: LoraTerm) -> float:
    """``lora_alpha``, as a float32 that gives the term's scaling when divided by its rank."""
    return float(np.float32(term.scaling * term.rank))


def _checked(adapter: Adapter, stem: str) -> LoraTerm:
    term = adapter.terms[stem]
    what = None
    if isinstance(term, Replacement):
        what = f"{stem} whole (modules_to_save)"
    elif term.magnitude is not None:
        what = f"magnitudes (DoRA) of {stem}"
    if what is not None:
        raise UnsupportedError(
            f"an adapter GGUF with {what}", ("low-rank changes", "merging into the model's file")
        )
    return term
