"""Hands out a file's tensors by name and shape, and knows which ones nobody asked for.

N outputs, K inputs, E experts, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.gguf.reader import GGUFFile
from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.layers.linear import QuantLinear

__all__ = ["Weights"]

_VECTOR_TYPES = ("F32", "F16", "BF16")


class Weights:
    """The tensors of a file, each to be taken by the layer that needs it.

    A matrix is repacked on the CPU, tensor by tensor, and uploaded: besides the model itself there
    is never more than one tensor in memory, and nothing is dequantized.

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
        self._taken: set[str] = set()
        self._taken_bytes = 0
        self._total_bytes = sum(info.nbytes for info in gguf.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.gguf.tensors

    def linear(self, stem: str, outputs: int, inputs: int, *, bias: bool = False) -> QuantLinear:
        """The layer of ``<stem>.weight`` (N, K), with ``<stem>.bias`` if the file has one.

        Args:
            bias: a bias must be there.

        Raises:
            GGUFError: a tensor is missing or has another shape.
            UnsupportedError: its type has no format.
        """
        weight = self.packed(f"{stem}.weight", (outputs, inputs))
        has_bias = bias or f"{stem}.bias" in self
        return QuantLinear(
            weight,
            self.vector(f"{stem}.bias", outputs) if has_bias else None,
            numerics=self.numerics,
            name=stem,
        )

    def packed(self, name: str, shape: tuple[int, ...]) -> PackedTensor:
        """A matrix (N, K), or a stack (E, N, K) as one of E * N rows."""
        info = self._info(name, shape)
        data = self.gguf.data(name)
        *rows, columns = shape
        try:
            packed = PackedTensor.from_bytes(info.type, data, (torch.Size(rows).numel(), columns))
        except UnsupportedError as error:
            raise UnsupportedError(f"tensor {name!r}: {error.what}", error.supported) from None
        self._take(name, info.nbytes)
        return packed.to(self.device)

    def vector(self, name: str, length: int) -> Tensor:
        """A norm's weight, a bias or the like, as float32 [D]."""
        info = self._info(name, (length,))
        if info.type.name not in _VECTOR_TYPES:
            raise UnsupportedError(f"tensor {name!r}: a vector of {info.type.name}", _VECTOR_TYPES)
        values = formats.dequantize(info.type, self.gguf.data(name))
        self._take(name, info.nbytes)
        return values.to(self.device)

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

    def _info(self, name: str, shape: tuple[int, ...]):
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

    def _take(self, name: str, nbytes: int) -> None:
        self._taken.add(name)
        self._taken_bytes += nbytes
        if self._progress is not None:
            self._progress(self._taken_bytes, self._total_bytes)
