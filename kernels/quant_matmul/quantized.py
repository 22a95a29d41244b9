"""Rows of activations that are there in 8 bits too, made by the kernel that made the rows.

An integer product quantizes its input in a kernel of its own, unless the kernel before has done so
on the way: ``rms_norm_quantized`` does.

Shapes: M rows, K values per row, a multiple of 32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from oxillama_torch.kernels.registry import Kernel

__all__ = ["QuantizedRows", "options_of", "plain"]


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows, and the same in 8 bits: what ``triton_quantize.quantize`` makes of them.

    Args:
        x: float32, bfloat16 or float16 [M, K].
        values: int8 [M, K].
        scales, sums: float32 [M, K / 32].
    """

    x: Tensor
    values: Tensor
    scales: Tensor
    sums: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @property
    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """values, scales, sums."""
        return self.values, self.scales, self.sums


def plain(x: Tensor | QuantizedRows) -> Tensor:
    """The rows themselves."""
    return x.x if isinstance(x, QuantizedRows) else x


def options_of(kernel: Kernel, x: Tensor | QuantizedRows) -> dict[str, Any]:
    """Keyword arguments that hand the 8-bit form to a kernel that takes it."""
    return {"quantized": x} if isinstance(x, QuantizedRows) and kernel.takes_quantized else {}
