"""Gated feed-forward layer.

T tokens, D hidden size, F intermediate size.
"""

from __future__ import annotations

from torch import Tensor, nn

from oxillama_torch.kernels.activation.op import gated
from oxillama_torch.kernels.quant_matmul.fused import quant_matmul_gated, wants_quantized
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.layers.lora import AdapterBatch

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """``y = W_down (activation(W_gate x) * W_up x)`` (Shazeer 2020).

    Args:
        gate_up: two layers D -> F;  down: F -> D.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        numerics: ``"invariant"`` or ``"fast"``.
    """

    def __init__(
        self,
        *,
        gate_up: LinearGroup,
        down: QuantLinear,
        activation: str,
        numerics: str = "invariant",
    ) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down
        self.activation = activation
        self.numerics = numerics

    def forward(self, x_TD: Tensor | QuantizedRows, adapters: AdapterBatch | None = None) -> Tensor:
        return self.down(self._hidden(x_TD, adapters), adapters)

    def wants_quantized(self, x_TD: Tensor) -> bool:
        """Whether gate and up would quantize these rows, so that whoever makes them may."""
        if not self._one_launch:
            return self.gate_up.wants_quantized(x_TD)
        weights = [self.gate_up.linears[0].weight]
        return wants_quantized(x_TD, weights, self.numerics, gated=True)

    @property
    def _one_launch(self) -> bool:
        """Gate and up are one weight, and nothing but adapters could come between."""
        linears = self.gate_up.linears
        return len(linears) == 1 and linears[0].bias is None

    def _hidden(self, x_TD: Tensor | QuantizedRows, adapters: AdapterBatch | None) -> Tensor:
        """[T, F]."""
        if adapters is None and self._one_launch:
            weight = self.gate_up.linears[0].weight
            return quant_matmul_gated(x_TD, weight, self.activation, numerics=self.numerics)
        gate_TF, up_TF = self.gate_up(x_TD, adapters)
        return gated(gate_TF, up_TF, self.activation, numerics=self.numerics)
