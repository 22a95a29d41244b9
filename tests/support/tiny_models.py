"""Tiny random HuggingFace models and GGUF files with the same weights: the oracle of the models.

``write_tiny("qwen3", path)`` builds a two-layer model with transformers, draws every parameter anew
(norms and biases too: transformers starts them at one and zero, which would hide a missing one),
writes them with gguf-py in llama.cpp's conventions, and returns the model, whose parameters hold
exactly what the file holds after quantization.

Sizes are chosen to catch mix-ups: heads x head size is not the hidden size, fewer key/value heads
than heads, a vocabulary that is no multiple of 32, a theta that is not 10000, and original contexts
short enough to be exceeded in a test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize, quantize
from tiny_vocabulary import tiny_vocabulary

__all__ = ["TINY_MODELS", "write_tiny"]

_THETA = 50_000.0
_BASE = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": _THETA},
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": _THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": _THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class TinyModel:
    """A case: GGUF architecture, transformers model type, and what its config overrides."""

    architecture: str
    model_type: str
    config: dict = field(default_factory=dict)


TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("llama", "llama"),
    "llama-biases": TinyModel("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": TinyModel("llama", "llama", {"tie_word_embeddings": True}),
    "llama-llama3": TinyModel("llama", "llama", {"rope_parameters": _LLAMA3}),
    "llama-linear": TinyModel(
        "llama",
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": _THETA, "factor": 4.0}},
    ),
    "llama-yarn": TinyModel("llama", "llama", {"rope_parameters": _YARN}),
    "mistral": TinyModel("llama", "mistral", {"sliding_window": 12}),
    "mixtral": TinyModel(
        "llama",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "granite": TinyModel(
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.1,
        },
    ),
    "qwen2": TinyModel("qwen2", "qwen2"),
    "qwen2-yarn": TinyModel("qwen2", "qwen2", {"rope_parameters": _YARN}),
    "qwen3": TinyModel("qwen3", "qwen3"),
    "qwen3moe": TinyModel(
        "qwen3moe",
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
}


def write_tiny(
    arch: str, path: Path | str, *, type_name: str = "F32", seed: int = 0, **overrides
) -> transformers.PreTrainedModel:
    """Write a tiny random GGUF file and return the HuggingFace model with the same weights.

    Args:
        arch: a key of :data:`TINY_MODELS`.
        path: where the file goes.
        type_name: GGML type of the matrices, one that gguf-py can encode; vectors stay F32.
        seed: of the random weights.
        overrides: fields of the HuggingFace config.
    """
    tiny = TINY_MODELS[arch]
    fields = {**_BASE, "vocab_size": len(tiny_vocabulary().tokens), **tiny.config, **overrides}
    config = transformers.AutoConfig.for_model(tiny.model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    _draw_weights(model, seed)
    writer = gguf.GGUFWriter(path, tiny.architecture)
    writer.add_name(f"tiny-{arch}")
    _write_config(writer, config, tiny.architecture)
    tiny_vocabulary().write(writer)
    for name, data, kind in _tensors(model, config, gguf.GGMLQuantizationType[type_name]):
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval()


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.data = 1.0 + 0.2 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.3 * noise
        else:
            # wide enough for attention to be far from uniform, so that positions matter
            parameter.data = 1.5 / math.sqrt(parameter.shape[-1]) * noise


def _write_config(writer: gguf.GGUFWriter, config, architecture: str) -> None:
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("llama", "granite"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    experts = getattr(config, "num_local_experts", getattr(config, "num_experts", None))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if architecture == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_attention_scale(config.attention_multiplier)


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
}


def _tensors(model, config, type: gguf.GGMLQuantizationType):
    """Yield (GGUF name, encoded array, type); put what the encoding left back into the model."""
    interleaved = config.model_type in ("llama", "mistral", "mixtral", "granite")
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and not name.endswith("mlp.gate.weight")
        kind = type if matrix else gguf.GGMLQuantizationType.F32
        data = quantize(parameter.detach().numpy(), kind)
        parameter.data = torch.from_numpy(np.array(dequantize(data, kind), np.float32))
        if name.endswith("experts.gate_up_proj"):
            prefix = f"blk.{name.split('.')[2]}."
            gate, up = np.split(data, 2, axis=1)
            yield f"{prefix}ffn_gate_exps.weight", gate, kind
            yield f"{prefix}ffn_up_exps.weight", up, kind
            continue
        if interleaved and ".q_proj." in name:
            data = _interleave(data, config.num_attention_heads)
        if interleaved and ".k_proj." in name:
            data = _interleave(data, config.num_key_value_heads)
        yield _gguf_name(name), data, kind
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(model, config), gguf.GGMLQuantizationType.F32


def _gguf_name(name: str) -> str:
    """Such as ``model.layers.3.self_attn.q_proj.bias`` -> ``blk.3.attn_q.bias``."""
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_with_suffix(rest)}"
    return _with_suffix(name)


def _with_suffix(name: str) -> str:
    stem = name.removesuffix(".weight").removesuffix(".bias")
    suffix = ".bias" if name.endswith(".bias") else ".weight"
    return _NAMES[stem] + suffix


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows so that rotating neighbours equals rotating halves, as llama files have it."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _llama3_factors(model, config) -> np.ndarray:
    """What divides the plain frequencies to give the model's own."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -exponents
    return (plain / model.model.rotary_emb.inv_freq).float().numpy()
