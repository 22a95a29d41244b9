"""GGUF file -> HuggingFace config and state dict: what peft and transformers need to train on.

N outputs, K inputs, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile
from oxillama_torch.layers.rope import RopeConfig
from oxillama_torch.models.config import LayerConfig, ModelConfig
from oxillama_torch.models.weights import Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["export_hf"]

# Architecture of the file -> model type of transformers.
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def export_hf(gguf: GGUFFile) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Dequantize a dense model into the form in which transformers holds it.

        config, state = export_hf(gguf)
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(state)

    The rows of q and k in llama files, interleaved so that neighbours rotate, go back to halves.

    Args:
        gguf: the open file; its architecture is llama, qwen2 or qwen3.

    Returns:
        ``LlamaConfig``, ``Qwen2Config`` or ``Qwen3Config``, and float32 tensors by HuggingFace
        name. A tied head is in both places.

    Raises:
        UnsupportedError: something in the file has no place in that form; names it.
        GGUFError: a tensor or key is missing or has the wrong shape or type.
    """
    metadata = Metadata(gguf.metadata, str(gguf.path))
    config = ModelConfig.from_metadata(metadata)
    _check(config)
    weights = Weights(gguf)
    rope = _rope(config, weights)
    exporter = _Exporter(config, weights)
    state = exporter.state()
    weights.check_all_taken()
    return _hf_config(config, metadata, rope, exporter), state


def _check(config: ModelConfig) -> None:
    """Raise for what the HuggingFace classes cannot say."""
    name = config.architecture.name
    if name not in _MODEL_TYPES:
        raise UnsupportedError(f"exporting architecture {name!r}", sorted(_MODEL_TYPES))
    if config.experts is not None:
        raise UnsupportedError(f"exporting the experts of {config.name!r}", ["dense models"])
    if any(layer != config.layers[0] for layer in config.layers):
        raise UnsupportedError("exporting layers of different sizes", ["layers of one size"])
    if config.layers[0].window is not None:
        raise UnsupportedError(f"exporting a sliding window of {config.layers[0].window} tokens")
    if config.key_dim != config.value_dim:
        sizes = f"{config.key_dim} and {config.value_dim}"
        raise UnsupportedError(f"exporting key and value heads of different sizes ({sizes})")
    if config.rope.dim != config.key_dim:
        what = f"exporting a rotation of {config.rope.dim} of {config.key_dim} dimensions"
        raise UnsupportedError(what)


def _rope(config: ModelConfig, weights: Weights) -> dict[str, Any]:
    """``rope_parameters`` with the same angles and the same factor of cos and sin."""
    rope, name = config.rope, "rope_freqs.weight"
    parameters = {"rope_theta": rope.theta, **_scaling(rope, config.name)}
    if name not in weights:
        return parameters
    if parameters["rope_type"] != "default":
        what = f"exporting {name} together with {rope.scaling} scaling"
        raise UnsupportedError(what, ["one of the two"])
    # Llama 3's own parameters are not in the file; divisors of each frequency are what longrope has
    factors = weights.vector(name, rope.dim // 2).tolist()
    return parameters | {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.context_length,
    }


def _scaling(rope: RopeConfig, name: str) -> dict[str, Any]:
    if rope.scaling == "yarn":
        return {
            "rope_type": "yarn",
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_context,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.mscale(),
        }
    if rope.mscale() != 1.0:
        raise UnsupportedError(f"exporting {name!r}: rope.scaling.attn_factor without yarn")
    if rope.scaling == "linear" and rope.factor != 1.0:
        return {"rope_type": "linear", "factor": rope.factor}
    return {"rope_type": "default"}


def _hf_config(
    config: ModelConfig, metadata: Metadata, rope: dict[str, Any], exporter: _Exporter
) -> PretrainedConfig:
    from transformers import AutoConfig

    layer = config.layers[0]
    ids = {
        f"{token}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id", int, None)
        for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return AutoConfig.for_model(
        _MODEL_TYPES[config.architecture.name],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=layer.num_heads,
        num_key_value_heads=layer.num_kv_heads,
        head_dim=config.key_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=exporter.tied,
        attention_bias=exporter.attention_bias,
        mlp_bias=exporter.mlp_bias,
        **ids,
    )


class _Exporter:
    """Takes a file's tensors under HuggingFace's names.

    A HuggingFace class has biases on a whole group of layers or on none: where the file has some of
    them, the others are zeros.

    Attributes:
        tied: the file has no head of its own.
        attention_bias, mlp_bias: of the config.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        name = config.architecture.name
        self.tied = "output.weight" not in weights
        self.attention_bias = name != "qwen2" and self._any_bias(_ATTENTION)
        self.mlp_bias = name == "llama" and self._any_bias(_MLP)
        self._biased: set[str] = set()
        if name == "qwen2":  # its config does not speak of them
            self._biased |= {"attn_q", "attn_k", "attn_v"}
        if self.attention_bias:
            self._biased |= _ATTENTION.keys()
        if self.mlp_bias:
            self._biased |= _MLP.keys()

    def state(self) -> dict[str, Tensor]:
        """Every tensor, float32."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        embedding = self._matrix("token_embd", shape)
        state = {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": self._vector("output_norm.weight", shape[1]),
            "lm_head.weight": embedding if self.tied else self._matrix("output", shape),
        }
        for index, layer in enumerate(self.config.layers):
            tensors = self._layer(f"blk.{index}", layer)
            state |= {f"model.layers.{index}.{name}": value for name, value in tensors.items()}
        return state

    def _layer(self, prefix: str, layer: LayerConfig) -> dict[str, Tensor]:
        config = self.config
        hidden, inner = config.hidden_size, layer.intermediate_size
        queries, keys = layer.num_heads * config.key_dim, layer.num_kv_heads * config.key_dim
        shapes = {
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        heads = {"attn_q": layer.num_heads, "attn_k": layer.num_kv_heads}
        tensors = {}
        for stem, module in (_ATTENTION | _MLP).items():
            name, rotated = f"{prefix}.{stem}", heads.get(stem, 0)
            tensors[f"{module}.weight"] = self._halves(self._matrix(name, shapes[stem]), rotated)
            if stem in self._biased:
                bias = self._bias(f"{name}.bias", shapes[stem][0])
                tensors[f"{module}.bias"] = self._halves(bias, rotated)
        return tensors | self._norms(prefix)

    def _norms(self, prefix: str) -> dict[str, Tensor]:
        sizes = dict.fromkeys(_NORMS, self.config.hidden_size)
        if self.config.architecture.qk_norm:
            sizes |= dict.fromkeys(_HEAD_NORMS, self.config.key_dim)
        modules = _NORMS | _HEAD_NORMS
        return {
            f"{modules[stem]}.weight": self._vector(f"{prefix}.{stem}.weight", size)
            for stem, size in sizes.items()
        }

    def _halves(self, rows: Tensor, heads: int) -> Tensor:
        """Rows [H * D, ...] of q or k of a llama file, each head's halves one after the other."""
        if not heads or self.config.architecture.rope_style != "norm":
            return rows
        pairs = rows.unflatten(0, (heads, -1, 2))
        return pairs.transpose(1, 2).flatten(0, 2).contiguous()

    def _matrix(self, stem: str, shape: tuple[int, int]) -> Tensor:
        return self.weights.packed({f"{stem}.weight": shape}).dequantize().clone()

    def _vector(self, name: str, size: int) -> Tensor:
        return self.weights.vector(name, size).clone()  # the file may be closed; so above

    def _bias(self, name: str, size: int) -> Tensor:
        return self._vector(name, size) if name in self.weights else torch.zeros(size)

    def _any_bias(self, stems: dict[str, str]) -> bool:
        layers = range(self.config.num_layers)
        return any(f"blk.{i}.{stem}.bias" in self.weights for i in layers for stem in stems)
