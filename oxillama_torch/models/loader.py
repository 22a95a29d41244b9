"""GGUF file -> Decoder: the one place that knows what the tensors are called.

N outputs, K inputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile
from oxillama_torch.layers.attention import Attention
from oxillama_torch.layers.linear import Embedding, QuantLinear
from oxillama_torch.layers.lora import HEAD
from oxillama_torch.layers.mlp import GatedMLP
from oxillama_torch.layers.moe import MixtureOfExperts
from oxillama_torch.layers.norm import RMSNorm
from oxillama_torch.layers.rope import HeadNorms, RotaryEmbedding
from oxillama_torch.models.config import LayerConfig, ModelConfig
from oxillama_torch.models.decoder import Decoder, DecoderLayer
from oxillama_torch.models.memory import memory_plan
from oxillama_torch.models.weights import Weights

__all__ = ["load_model", "memory_plan"]


def load_model(
    gguf: GGUFFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    numerics: str = "invariant",
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Build the decoder of a file; the file may be closed afterwards.

    Args:
        gguf: the open file.
        device: where the weights go.
        dtype: of the activations.
        numerics: ``"invariant"`` or ``"fast"``.
        progress: called with (bytes loaded, bytes in all) after each tensor.

    Raises:
        GGUFError: a tensor or key is missing or has the wrong shape or type.
        UnsupportedError: architecture, key, tensor or GGML type that this build does not know.
    """
    config = ModelConfig.from_metadata(Metadata(gguf.metadata, str(gguf.path)))
    weights = Weights(gguf, device=device, numerics=numerics, progress=progress)
    try:
        decoder = _Builder(config, weights).decoder(dtype)
    finally:
        weights.close()
    weights.check_all_taken()
    return decoder


class _Builder:
    """Makes layers out of a file's tensors; method by method, a decoder from the outside in."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights
        self.numerics = weights.numerics
        self.rope = self._rope()

    def decoder(self, dtype: torch.dtype) -> Decoder:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        table = self.weights.packed({"token_embd.weight": shape})
        if "output.weight" in self.weights:
            head = self.weights.linear(HEAD, *shape)
        else:
            head = QuantLinear(table, parts={HEAD: shape[0]}, numerics=self.numerics)
        return Decoder(
            config,
            embedding=Embedding(table, dtype, config.embedding_scale),
            layers=[self._layer(f"blk.{i}", layer) for i, layer in enumerate(config.layers)],
            norm=self._norm("output_norm"),
            head=head,
            numerics=self.numerics,
        )

    def _layer(self, prefix: str, layer: LayerConfig) -> DecoderLayer:
        dense = self.config.experts is None
        return DecoderLayer(
            attention_norm=self._norm(f"{prefix}.attn_norm"),
            attention=self._attention(prefix, layer),
            ffn_norm=self._norm(f"{prefix}.ffn_norm"),
            ffn=self._mlp(prefix, layer) if dense else self._experts(prefix, layer),
            residual_scale=self.config.residual_scale,
        )

    def _attention(self, prefix: str, layer: LayerConfig) -> Attention:
        config = self.config
        qkv = {
            f"{prefix}.attn_q": layer.num_heads * config.key_dim,
            f"{prefix}.attn_k": layer.num_kv_heads * config.key_dim,
            f"{prefix}.attn_v": layer.num_kv_heads * config.value_dim,
        }
        return Attention(
            qkv=self.weights.group(qkv, config.hidden_size, bias=config.architecture.qkv_bias),
            output=self.weights.linear(
                f"{prefix}.attn_output", config.hidden_size, layer.num_heads * config.value_dim
            ),
            rope=self.rope,
            norms=self._head_norms(prefix) if config.architecture.qk_norm else None,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            scale=config.attention_scale,
            window=layer.window,
            numerics=self.numerics,
        )

    def _mlp(self, prefix: str, layer: LayerConfig) -> GatedMLP:
        hidden, intermediate = self.config.hidden_size, layer.intermediate_size
        gate_up = {f"{prefix}.ffn_gate": intermediate, f"{prefix}.ffn_up": intermediate}
        return GatedMLP(
            gate_up=self.weights.group(gate_up, hidden),
            down=self.weights.linear(f"{prefix}.ffn_down", hidden, intermediate),
            activation=self.config.architecture.activation,
            numerics=self.numerics,
        )

    def _experts(self, prefix: str, layer: LayerConfig) -> MixtureOfExperts:
        hidden, intermediate = self.config.hidden_size, layer.intermediate_size
        experts = self.config.experts
        gate_up = [f"{prefix}.ffn_gate_exps.weight", f"{prefix}.ffn_up_exps.weight"]
        down = {f"{prefix}.ffn_down_exps.weight": (experts.count, hidden, intermediate)}
        return MixtureOfExperts(
            router=self.weights.linear(f"{prefix}.ffn_gate_inp", experts.count, hidden),
            gate_up=self.weights.experts(gate_up, (experts.count, intermediate, hidden)),
            down=self.weights.packed(down),
            num_experts=experts.count,
            num_chosen=experts.used,
            normalize=experts.normalize,
            scale=experts.scale,
            activation=self.config.architecture.activation,
            name=prefix,
            numerics=self.numerics,
        )

    def _norm(self, stem: str) -> RMSNorm:
        weight = self.weights.vector(f"{stem}.weight", self.config.hidden_size)
        return RMSNorm(weight, self.config.norm_eps, name=stem, numerics=self.numerics)

    def _head_norms(self, prefix: str) -> HeadNorms:
        q, k = (
            self.weights.vector(f"{prefix}.attn_{part}_norm.weight", self.config.key_dim)
            for part in "qk"
        )
        return HeadNorms(q, k, self.config.norm_eps)

    def _rope(self) -> RotaryEmbedding:
        name, pairs = "rope_freqs.weight", self.config.rope.dim // 2
        factors = self.weights.vector(name, pairs, device="cpu") if name in self.weights else None
        return RotaryEmbedding(
            self.config.rope, factors, device=self.weights.device, numerics=self.numerics
        )
