"""Linear and embedding layers whose weights stay in their GGML format.

T tokens, K inputs, N outputs, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oxillama_torch.kernels.embedding.op import embedding
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.op import quant_matmul

__all__ = ["Embedding", "QuantLinear"]


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with W packed.

    Args:
        weight: packed, shape (N, K).
        bias: float32 [N] or None.
        numerics: ``"invariant"`` or ``"fast"``.
        name: stem of the tensor's name in the file, such as ``blk.0.attn_q``.
    """

    def __init__(
        self,
        weight: PackedTensor,
        bias: Tensor | None = None,
        *,
        numerics: str = "invariant",
        name: str = "",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.numerics = numerics
        self.name = name

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x_TK: Tensor) -> Tensor:
        return quant_matmul(x_TK, self.weight, self.bias, numerics=self.numerics)

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return (
            f"{self.name}: {self.in_features} -> {self.out_features}, {self.weight.type_name}{bias}"
        )


class Embedding(nn.Module):
    """Rows of a packed table, times ``scale``.

    Args:
        weight: packed, shape (V, D).
        dtype: of the activations.
        scale: factor of every row.
    """

    def __init__(self, weight: PackedTensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self.scale = scale

    def forward(self, ids_T: Tensor) -> Tensor:
        x_TD = embedding(ids_T, self.weight, self.dtype)
        return x_TD if self.scale == 1.0 else x_TD * self.scale

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{rows} x {columns}, {self.weight.type_name}"
