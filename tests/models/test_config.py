"""ModelConfig from metadata: defaults of the GGUF specification, and what is refused.

Oracle: the specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and how
llama.cpp reads the keys (src/llama-model.cpp).
"""

from __future__ import annotations

import numpy as np
import pytest

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.models.config import ExpertConfig, ModelConfig

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 2048,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 1000,
}


def read(**changes) -> ModelConfig:
    """A llama with keys changed; ``__`` stands for a dot and None takes a key away."""
    changed = {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    values = {key: value for key, value in {**LLAMA, **changed}.items() if value is not None}
    return ModelConfig.from_metadata(Metadata(values))


def test_defaults():
    config = read()
    assert (config.key_dim, config.value_dim, config.num_layers) == (32, 32, 3)
    assert {layer.num_kv_heads for layer in config.layers} == {8}
    assert {layer.window for layer in config.layers} == {None}
    assert (config.rope.dim, config.rope.theta, config.rope.style) == (32, 10_000.0, "norm")
    assert config.rope.factor == 1.0
    assert config.experts is None
    assert config.attention_scale == 32**-0.5
    assert config.name == "llama"


def test_head_sizes_are_not_hidden_by_heads():
    config = read(attention__key_length=96, attention__value_length=64)
    assert (config.key_dim, config.value_dim, config.rope.dim) == (96, 64, 96)
    assert config.attention_scale == 96**-0.5


def test_the_file_says_how_embeddings_are_pooled():
    found = [read(pooling_type=number).pooling for number in (None, 0, 1, 2, 3)]
    assert found == ["last", "last", "mean", "first", "last"]
    with pytest.raises(UnsupportedError, match="pooling_type = 4"):  # a reranker's
        read(pooling_type=4)


def test_arrays_give_one_value_per_layer():
    config = read(
        attention__head_count_kv=np.array([8, 4, 2], np.uint32),
        feed_forward_length=np.array([512, 640, 768], np.int32),
    )
    assert [layer.num_kv_heads for layer in config.layers] == [8, 4, 2]
    assert [layer.intermediate_size for layer in config.layers] == [512, 640, 768]


def test_vocabulary_size_comes_from_the_tokens_when_the_key_is_missing():
    values = {**LLAMA, "tokenizer.ggml.tokens": ["a", "b", "c"]}
    del values["llama.vocab_size"]
    assert ModelConfig.from_metadata(Metadata(values)).vocab_size == 3


@pytest.mark.parametrize(
    ("changes", "scaling", "factor"),
    [
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "yarn", 4.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, "none", 4.0),
        ({"rope__scaling__factor": 4.0}, "linear", 4.0),
        ({"rope__scale_linear": 2.0}, "linear", 2.0),
        ({"rope__scaling__factor": 0.0}, "linear", 1.0),
        ({"rope__scaling__factor": 4}, "linear", 4.0),
    ],
)
def test_rope_scaling(changes, scaling, factor):
    rope = read(**changes).rope
    assert (rope.scaling, rope.factor, rope.original_context) == (scaling, factor, 2048)


def test_experts():
    assert read(expert_count=0).experts is None
    config = read(expert_count=8, expert_used_count=2, expert_feed_forward_length=64)
    assert config.experts == ExpertConfig(count=8, used=2, normalize=True, scale=1.0)
    assert {layer.intermediate_size for layer in config.layers} == {64}


def test_sliding_window_holds_in_every_layer():
    assert [layer.window for layer in read(attention__sliding_window=9).layers] == [9, 9, 9]
    assert [layer.window for layer in read(attention__sliding_window=0).layers] == [None] * 3


def test_keys_without_effect_are_let_through():
    read(
        rope__scaling__finetuned=False,
        rope__scaling__yarn_ext_factor=1.0,
        expert_shared_count=0,
        tensor_data_layout="Meta AI original pth",
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_count": None}, "llama.block_count"),
        ({"block_count": 1 << 31}, "llama.block_count"),
        ({"attention__head_count": 0}, "llama.attention.head_count"),
        ({"attention__head_count": 257}, "llama.attention.head_count"),
        ({"attention__head_count": "8"}, "llama.attention.head_count"),
        ({"attention__head_count_kv": 3}, "llama.attention.head_count_kv"),
        ({"attention__head_count_kv": np.array([8, 8])}, "llama.attention.head_count_kv"),
        ({"attention__head_count_kv": np.array([8, 0, 8])}, "llama.attention.head_count_kv"),
        ({"attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
        ({"rope__dimension_count": 33}, "llama.rope.dimension_count"),
        ({"rope__dimension_count": 64}, "llama.rope.dimension_count"),
        ({"rope__freq_base": 0.0}, "llama.rope.freq_base"),
        ({"rope__scaling__factor": -1.0}, "llama.rope.scaling.factor"),
        ({"rope__scaling__original_context_length": 0}, "original_context_length"),
        ({"vocab_size": None}, "llama.vocab_size"),
        ({"expert_count": 4, "expert_used_count": 5}, "llama.expert_used_count"),
        ({"expert_count": 4}, "llama.expert_used_count"),
    ],
)
def test_bad_values_are_named(changes, named):
    with pytest.raises(GGUFError, match=named.replace(".", r"\.")):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
        ({"attention__sliding_window_pattern": [True, False, True]}, "sliding_window_pattern"),
        ({"logit_scale": 2.0}, "llama.logit_scale"),
        ({"some.new_key": 1}, "llama.some.new_key"),
        ({"expert_shared_count": 1}, "llama.expert_shared_count = 1"),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type = 'longrope'"),
        ({"rope__scaling__yarn_ext_factor": 0.5}, "llama.rope.scaling.yarn_ext_factor = 0.5"),
        (
            {"expert_count": 4, "expert_used_count": 2, "expert_gating_func": 2},
            "llama.expert_gating_func = 2",
        ),
    ],
)
def test_what_would_change_results_unseen_is_refused_by_name(changes, named):
    with pytest.raises(UnsupportedError, match=named.replace(".", r"\.")):
        read(**changes)


def test_granite_without_rotation_is_refused():
    values = {key.replace("llama", "granite"): value for key, value in LLAMA.items()}
    values["general.architecture"] = "granite"
    ModelConfig.from_metadata(Metadata({**values, "granite.rope.scaling.finetuned": True}))
    with pytest.raises(UnsupportedError, match=r"granite\.rope\.scaling\.finetuned = False"):
        ModelConfig.from_metadata(Metadata({**values, "granite.rope.scaling.finetuned": False}))


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match="'rwkv9'.*llama, qwen2, qwen3, qwen3moe"):
        ModelConfig.from_metadata(Metadata({"general.architecture": "rwkv9"}))
