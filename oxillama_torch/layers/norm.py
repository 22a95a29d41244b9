"""Root-mean-square norm of the residual stream.

T rows, D features.
"""

from __future__ import annotations

from torch import Tensor, nn

from oxillama_torch.kernels.norm.op import rms_norm, rms_norm_quantized
from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.layers.lora import AdapterBatch

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * weight``, computed in float32 (Zhang & Sennrich 2019).

    Args:
        weight: float32 [D].
        eps: added to the mean square.
        name: in the file, such as ``blk.0.attn_norm``.
        numerics: ``"invariant"`` or ``"fast"``.
    """

    def __init__(
        self, weight: Tensor, eps: float, *, name: str = "", numerics: str = "invariant"
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps, self.name = eps, name
        self.numerics = numerics

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, adapters: AdapterBatch | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(norm(x + residual), x + residual)`` in one kernel; no residual counts as zero."""
        normed = rms_norm(x_TD, self.weight, self.eps, residual=residual_TD, numerics=self.numerics)
        y_TD, sum_TD = (normed, x_TD) if residual_TD is None else normed
        if adapters is not None:
            adapters.add_norm(y_TD, sum_TD, self.name, self.eps, self.numerics)
        return y_TD, sum_TD

    def quantized(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[QuantizedRows, Tensor]:
        """The same for an integer product: rows that are there in 8 bits too; no adapters."""
        return rms_norm_quantized(
            x_TD, self.weight, self.eps, residual=residual_TD, numerics=self.numerics
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"
