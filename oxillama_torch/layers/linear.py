"""Linear and embedding layers whose weights stay in their GGML format.

T tokens, K inputs, N outputs, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oxillama_torch.kernels.embedding.op import embedding
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.fused import quant_matmul_segments, wants_quantized
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows, plain
from oxillama_torch.layers.lora import AdapterBatch

__all__ = ["Embedding", "LinearGroup", "QuantLinear"]


class QuantLinear(nn.Module):
    """``y = x W^T + b`` with W packed, and what a step's adapters add.

    Args:
        weight: packed, shape (N, K).
        bias: float32 [N] or None.
        parts: name in the file -> rows, in order: one tensor, such as ``blk.0.ffn_down``, or
            several that were put one below the other because they share their input.
        numerics: ``"invariant"`` or ``"fast"``.
    """

    def __init__(
        self,
        weight: PackedTensor,
        bias: Tensor | None = None,
        *,
        parts: dict[str, int] | None = None,
        numerics: str = "invariant",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("bias", bias)
        self.parts = parts or {"": weight.shape[0]}
        self.numerics = numerics
        rows = sum(self.parts.values())
        assert rows == self.out_features, f"parts of {rows} rows in {self.out_features}"

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x_TK: Tensor, adapters: AdapterBatch | None = None) -> Tensor:
        y_TN = quant_matmul(x_TK, self.weight, self.bias, numerics=self.numerics)
        return self.add_adapters(y_TN, x_TK, adapters)

    def add_adapters(self, y_TN: Tensor, x_TK: Tensor, adapters: AdapterBatch | None) -> Tensor:
        """The layer's output from its product."""
        if adapters is None:
            return y_TN
        return adapters.add(y_TN, x_TK, self.parts, self.bias, self.numerics)

    def extra_repr(self) -> str:
        names = ", ".join(self.parts)
        bias = "" if self.bias is None else ", bias"
        return f"{names}: {self.in_features} -> {self.out_features}, {self.weight.type_name}{bias}"


class LinearGroup(nn.Module):
    """Several linear layers of one input, in as few matrix products as their types allow.

    Args:
        linears: the products; together their parts are the layers, in order.
    """

    def __init__(self, linears: list[QuantLinear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(
        self, x_TK: Tensor | QuantizedRows, adapters: AdapterBatch | None = None
    ) -> list[Tensor]:
        """The outputs of all parts, [T, rows] each; they share memory within a product."""
        outputs = []
        for linear, y_TN in zip(self.linears, self._products(x_TK)):
            y_TN = linear.add_adapters(y_TN, plain(x_TK), adapters)
            outputs += y_TN.split(list(linear.parts.values()), dim=1)
        return outputs

    def wants_quantized(self, x_TK: Tensor) -> bool:
        """Whether the products would quantize these rows, so that whoever makes them may."""
        weights = [linear.weight for linear in self.linears]
        return wants_quantized(x_TK, weights, self.linears[0].numerics)

    def _products(self, x_TK: Tensor | QuantizedRows) -> list[Tensor]:
        first = self.linears[0]
        if len(self.linears) == 1:
            return [quant_matmul(x_TK, first.weight, first.bias, numerics=first.numerics)]
        return quant_matmul_segments(
            x_TK,
            [linear.weight for linear in self.linears],
            [linear.bias for linear in self.linears],
            numerics=first.numerics,
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

    def forward(self, ids_T: Tensor, adapters: AdapterBatch | None = None) -> Tensor:
        x_TD = embedding(ids_T, self.weight, self.dtype)
        if adapters is not None:
            adapters.add_embedding(x_TD, ids_T)
        return x_TD if self.scale == 1.0 else x_TD * self.scale

    def extra_repr(self) -> str:
        rows, columns = self.weight.shape
        return f"{rows} x {columns}, {self.weight.type_name}"
