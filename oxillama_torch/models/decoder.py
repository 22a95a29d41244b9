"""The decoder: token ids in, logits out. One class for every architecture of the table.

T tokens of all requests of a step, D hidden size, V vocabulary, R rows whose logits are wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from oxillama_torch.kernels.quant_matmul.quantized import QuantizedRows
from oxillama_torch.layers.attention import Attention, ForwardBatch
from oxillama_torch.layers.linear import Embedding, LinearGroup, QuantLinear
from oxillama_torch.layers.lora import AdapterBatch
from oxillama_torch.layers.mlp import GatedMLP
from oxillama_torch.layers.moe import MixtureOfExperts
from oxillama_torch.layers.norm import RMSNorm
from oxillama_torch.models.config import ModelConfig

__all__ = ["Decoder", "DecoderLayer"]


class Decoder(nn.Module):
    """Embedding, layers, final norm and head.

    What a token computes depends on its own request alone: layers are row-wise but for attention,
    and with invariant numerics a row's bits do not depend on the batch.

    Args:
        config: the model in numbers.
        embedding, layers, norm, head: the parts, as ``loader.load_model`` makes them.
        numerics: ``"invariant"`` or ``"fast"``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: QuantLinear,
        numerics: str = "invariant",
    ) -> None:
        super().__init__()
        self.config = config
        self.numerics = numerics
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.head = head

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def kv_shapes(self) -> list[tuple[int, int, int]]:
        """Per layer: key/value heads, size of a key head, size of a value head."""
        config = self.config
        return [(layer.num_kv_heads, config.key_dim, config.value_dim) for layer in config.layers]

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Run the batch's tokens through all layers; store their keys and values.

        Args:
            batch: the tokens and where they belong.
            kv: per layer, pages of keys [P, S, kv heads, key dim] and of values.

        Returns:
            Hidden states after the final norm, ``dtype`` [T, D].
        """
        x_TD, residual_TD = self.embedding(batch.input_ids, batch.adapters), None
        for layer, pages in zip(self.layers, kv, strict=True):
            x_TD, residual_TD = layer(x_TD, residual_TD, batch, pages)
        return self.norm(x_TD, residual_TD, batch.adapters)[0]

    @torch.inference_mode()
    def logits(self, hidden_RD: Tensor, adapters: AdapterBatch | None = None) -> Tensor:
        """Logits float32 [R, V] of some rows of ``forward``'s result.

        Args:
            adapters: of these rows; None: none of them has any.
        """
        logits_RV = self.head(hidden_RD.float(), adapters)
        scale = self.config.logit_scale
        return logits_RV if scale == 1.0 else logits_RV / scale


class DecoderLayer(nn.Module):
    """``h = h + attention(norm(h)); h = h + ffn(norm(h))``.

    The residual stream h is kept as a sum of two: ``residual`` and the ``x`` that the sublayer
    before has yet to add to it. The next norm's kernel does that addition on the way.
    """

    def __init__(
        self,
        *,
        attention_norm: RMSNorm,
        attention: Attention,
        ffn_norm: RMSNorm,
        ffn: GatedMLP | MixtureOfExperts,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.ffn_norm, self.ffn = ffn_norm, ffn
        self.residual_scale = residual_scale

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor | None, batch: ForwardBatch, kv: tuple
    ) -> tuple[Tensor, Tensor]:
        norm, consumer = self.attention_norm, self.attention.qkv
        x_TD, residual_TD = _normed(norm, x_TD, residual_TD, consumer, batch.adapters)
        x_TD = self._scaled(self.attention(x_TD, batch, kv))
        x_TD, residual_TD = _normed(self.ffn_norm, x_TD, residual_TD, self.ffn, batch.adapters)
        return self._scaled(self.ffn(x_TD, batch.adapters)), residual_TD

    def _scaled(self, x_TD: Tensor) -> Tensor:
        return x_TD if self.residual_scale == 1.0 else x_TD * self.residual_scale


def _normed(
    norm: RMSNorm,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    consumer: LinearGroup | GatedMLP | MixtureOfExperts,
    adapters: AdapterBatch | None,
) -> tuple[Tensor | QuantizedRows, Tensor]:
    """``norm``, quantized on the way where its consumer would do that first thing."""
    takes = isinstance(consumer, LinearGroup | GatedMLP)
    if adapters is None and takes and consumer.wants_quantized(x_TD):
        return norm.quantized(x_TD, residual_TD)
    return norm(x_TD, residual_TD, adapters)
