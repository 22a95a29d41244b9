"""Copies of GGUF files with something changed, for tests of what a loader refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.gguf.writer import write_gguf

__all__ = ["rewrite"]


def rewrite(
    source: Path,
    target: Path,
    *,
    drop: tuple[str, ...] = (),
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, str]] | None = None,
) -> Path:
    """Copy ``source`` to ``target`` without the keys and tensors in ``drop``, then add others.

    Args:
        metadata: keys to set.
        tensors: name -> (values, GGML type name) to add or replace.
    """
    with read_gguf(source) as file:
        keys = {**file.metadata, **(metadata or {})}
        blocks = {
            name: (file.data(name).numpy().reshape(*info.shape[:-1], -1), info.type.name)
            for name, info in file.tensors.items()
        }
        blocks.update(tensors or {})
        write_gguf(
            target,
            {key: value for key, value in keys.items() if key not in drop},
            {name: tensor for name, tensor in blocks.items() if name not in drop},
        )
    return target
