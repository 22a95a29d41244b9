"""Hands out a file's tensors by name and shape, and knows which ones nobody asked for.

N outputs, K inputs, E experts, D features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.gguf.reader import GGUFFile, TensorInfo
from oxillama_torch.gguf.types import GGMLType
from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.models.upload import uploader

__all__ = ["Weights"]

_VECTOR_TYPES = ("F32", "F16", "BF16")


class Weights:
    """The tensors of a file, each to be taken by the layer that needs it.

    Matrices go to the device as they lie in the file and are repacked there, one product's worth
    at a time, while the next one is on its way; nothing is dequantized.

    Args:
        gguf: the open file.
        device: where tensors go.
        numerics: of the layers made here.
        progress: called with (bytes taken so far, bytes of all tensors) after each tensor.
    """

    def __init__(
        self,
        gguf: GGUFFile,
        *,
        device: torch.device | str = "cpu",
        numerics: str = "invariant",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.gguf = gguf
        self.device = torch.device(device)
        self.numerics = numerics
        self._progress = progress
        self._upload = uploader(self.device)
        self._taken: set[str] = set()
        self._taken_bytes = 0
        self._total_bytes = sum(info.nbytes for info in gguf.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.gguf.tensors

    def linear(self, stem: str, outputs: int, inputs: int) -> QuantLinear:
        """The layer of ``<stem>.weight`` (N, K), with ``<stem>.bias`` if the file has one.

        Raises:
            GGUFError: a tensor is missing or has another shape.
            UnsupportedError: its type has no format.
        """
        return self.group({stem: outputs}, inputs).linears[0]

    def group(self, parts: dict[str, int], inputs: int, *, bias: bool = False) -> LinearGroup:
        """The layers of several stems, all with the same input.

        Neighbours of one type, either all with a bias or all without, become one matrix: fewer and
        larger products.

        Args:
            parts: stem -> outputs.
            bias: every part must have one.
        """
        runs = _runs(parts, lambda stem: (self._type(f"{stem}.weight"), f"{stem}.bias" in self))
        return LinearGroup(
            [self._product({s: parts[s] for s in run}, inputs, bias) for run in runs]
        )

    def _product(self, parts: dict[str, int], inputs: int, bias: bool) -> QuantLinear:
        weight = self.packed({f"{stem}.weight": (rows, inputs) for stem, rows in parts.items()})
        biases = [
            self.vector(f"{stem}.bias", rows)
            for stem, rows in parts.items()
            if bias or f"{stem}.bias" in self
        ]
        return QuantLinear(
            weight, torch.cat(biases) if biases else None, parts=parts, numerics=self.numerics
        )

    def experts(self, names: list[str], shape: tuple[int, int, int]) -> list[PackedTensor]:
        """Stacks (E, N, K); neighbours of one type become one, expert by expert.

        Returns:
            Packed tensors of E * N rows, or of E * (N + N) where two became one.
        """
        return [self.packed(dict.fromkeys(run, shape)) for run in _runs(names, self._type)]

    def packed(self, shapes: dict[str, tuple[int, ...]]) -> PackedTensor:
        """One matrix of the tensors named, of one type: (N, K) below each other, (E, N, K) by E."""
        infos = [self._info(name, shape) for name, shape in shapes.items()]
        rows = sum(math.prod(info.shape[:-1]) for info in infos)
        stack = math.prod(infos[0].shape[:-2])  # E, or 1 for a matrix
        data = [self._on_device(info.name).view(stack, -1) for info in infos]
        together = data[0] if len(data) == 1 else torch.cat(data, dim=1)
        try:
            packed = PackedTensor.from_bytes(
                infos[0].type, together.flatten(), (rows, infos[0].shape[-1])
            )
        except UnsupportedError as error:
            what = f"tensor {infos[0].name!r}: {error.what}"
            raise UnsupportedError(what, error.supported) from None
        for info in infos:
            self._take(info)
        return packed

    def vector(self, name: str, length: int, *, device: str | None = None) -> Tensor:
        """A norm's weight, a bias or the like, as float32 [D], on ``device`` if it is given."""
        info = self._info(name, (length,))
        if info.type.name not in _VECTOR_TYPES:
            raise UnsupportedError(f"tensor {name!r}: a vector of {info.type.name}", _VECTOR_TYPES)
        values = formats.dequantize(info.type, self.gguf.data(name))
        self._take(info)
        return values.to(device or self.device)

    def close(self) -> None:
        """Give back what uploading has held."""
        if self._upload is not None:
            self._upload.close()

    def check_all_taken(self) -> None:
        """Raise for tensors that no layer asked for: the model would not be the file's.

        Raises:
            UnsupportedError: names them.
        """
        left = sorted(set(self.gguf.tensors) - self._taken)
        if left:
            shown = ", ".join(left[:8]) + (f" and {len(left) - 8} more" if len(left) > 8 else "")
            architecture = self.gguf.architecture
            raise UnsupportedError(
                f"tensors that architecture {architecture!r} has no use for: {shown}"
            )

    def _on_device(self, name: str) -> Tensor:
        data = self.gguf.data(name)
        return data.to(self.device) if self._upload is None else self._upload(data)

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.gguf.tensors.get(name)
        if info is None:
            raise GGUFError("missing tensor", path=str(self.gguf.path), tensor=name)
        if tuple(info.shape) != tuple(shape):
            raise GGUFError(
                f"wrong shape {tuple(info.shape)}",
                path=str(self.gguf.path),
                tensor=name,
                expected=f"{tuple(shape)}",
            )
        return info

    def _type(self, name: str) -> GGMLType | None:
        info = self.gguf.tensors.get(name)
        return None if info is None else info.type

    def _take(self, info: TensorInfo) -> None:
        self._taken.add(info.name)
        self._taken_bytes += info.nbytes
        if self._progress is not None:
            self._progress(self._taken_bytes, self._total_bytes)


def _runs(names: Iterable[str], key: Callable[[str], object]) -> list[list[str]]:
    """Neighbours with the same key."""
    return [list(run) for _, run in itertools.groupby(names, key)]
