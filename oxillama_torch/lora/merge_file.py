"""Adapters merged into a GGUF file: another file, written tensor by tensor.

N outputs, K inputs, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from oxillama_torch.gguf.reader import GGUFFile, TensorInfo
from oxillama_torch.gguf.rewrite import NewTensor, rewrite_gguf
from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels import formats
from oxillama_torch.lora.base import BaseFile
from oxillama_torch.lora.encode import TensorReport
from oxillama_torch.lora.merged import Merge, MergedTensor, merged_bias, merged_norm, touching

__all__ = ["merge_file"]


def merge_file(
    gguf: GGUFFile,
    merges: Sequence[Merge],
    path: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[TensorReport]:
    """Write a model with adapters in its weights; see ``Merge``.

    A head that was tied to the embedding becomes a tensor of its own where an adapter changes
    either of them: each adapter says for itself which of the two it means.

    Args:
        gguf: the open file of the model.
        merges: adapters that were read for this model.
        path: of the new file.
        progress: called with (bytes written, bytes in all).

    Returns: what encoding each changed matrix cost.

    Raises:
        UnsupportedError: a dtype is not known or cannot hold a weight; as ``rewrite_gguf``.
        OSError: the file cannot be written.
    """
    writer = _Writer(gguf, merges)
    rewrite_gguf(gguf, path, writer.tensors(), progress)
    return [merged.report() for merged in writer.merged]


class _Writer:
    """The tensors of the new file.

    Attributes:
        merged: matrices that are changed.
    """

    def __init__(self, gguf: GGUFFile, merges: Sequence[Merge]) -> None:
        self.gguf, self.base, self.merges = gguf, BaseFile(gguf), merges
        self.merged: list[MergedTensor] = []

    def tensors(self) -> list[NewTensor]:
        """In the order of the file; a head that it lacks at the end."""
        tensors = [self._tensor(info) for info in self.gguf.tensors.values()]
        if "output.weight" not in self.gguf.tensors and touching(self.merges, "output"):
            tensors.append(self._matrix("output.weight", "output"))
        elif "output.weight" not in self.gguf.tensors and touching(self.merges, "token_embd"):
            info = self.gguf.tensors["token_embd.weight"]
            tensors.append(self._copy(info, "output.weight"))
        return tensors

    def _tensor(self, info: TensorInfo) -> NewTensor:
        stem, _, part = info.name.rpartition(".")
        own = touching(self.merges, stem) if stem in self.base.shapes else []
        if not own:
            return self._copy(info, info.name)
        if part == "bias":
            return self._vector(info, lambda bias: merged_bias(stem, bias, own))
        if self.base.kind(stem) == "norm":
            return self._vector(info, lambda weight: merged_norm(stem, weight, own))
        return self._matrix(info.name, stem)

    def _copy(self, info: TensorInfo, name: str) -> NewTensor:
        return NewTensor(name, info.type, info.shape, lambda: [self.gguf.data(info.name)])

    def _matrix(self, name: str, stem: str) -> NewTensor:
        before = self.gguf.tensors[self.base.tensor(stem)].type.name
        merged = MergedTensor(stem, touching(self.merges, stem), self.base, before)
        self.merged.append(merged)
        type = GGMLType[merged.type_name]
        return NewTensor(name, type, self.base.shapes[stem], merged.pieces)

    def _vector(self, info: TensorInfo, change: Callable[[Tensor], Tensor]) -> NewTensor:
        def pieces() -> Iterable[Tensor]:
            old = formats.dequantize(info.type, self.gguf.data(info.name))
            return [change(old).contiguous().view(torch.uint8)]

        return NewTensor(info.name, GGMLType.F32, info.shape, pieces)
