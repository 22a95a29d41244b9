"""Rotary embedding. Oracle: transformers' frequencies and rotation."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from oxillama_torch.layers.rope import HeadNorms, RopeConfig, RotaryEmbedding


def transformers_rope(dim: int, **parameters):
    """Frequencies and attention factor of a transformers config."""
    config = LlamaConfig(head_dim=dim, max_position_embeddings=4096, rope_parameters=parameters)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("factor", [1.5, 8.0, 40.0])
@pytest.mark.parametrize("original", [64, 1000])
def test_yarn(dim, theta, factor, original):
    wanted, attention_factor = transformers_rope(
        dim,
        rope_type="yarn",
        rope_theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
    )
    rope = RopeConfig(
        style="neox",
        dim=dim,
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_context=original,
    )
    torch.testing.assert_close(rope.inverse_frequencies(), wanted, rtol=1e-6, atol=0)
    assert rope.mscale() == pytest.approx(attention_factor)


def test_yarn_with_its_own_ramp_and_temperature():
    wanted, attention_factor = transformers_rope(
        64,
        rope_type="yarn",
        rope_theta=10_000.0,
        factor=16.0,
        beta_fast=16.0,
        beta_slow=2.0,
        mscale=1.0,
        mscale_all_dim=0.7,
        original_max_position_embeddings=256,
    )
    rope = RopeConfig(
        style="neox",
        dim=64,
        theta=10_000.0,
        scaling="yarn",
        factor=16.0,
        original_context=256,
        beta_fast=16.0,
        beta_slow=2.0,
        log_multiplier=0.7,
    )
    torch.testing.assert_close(rope.inverse_frequencies(), wanted, rtol=1e-6, atol=0)
    assert rope.mscale() == pytest.approx(attention_factor)


def test_linear():
    wanted, _ = transformers_rope(64, rope_type="linear", rope_theta=5000.0, factor=3.0)
    rope = RopeConfig(style="norm", dim=64, theta=5000.0, scaling="linear", factor=3.0)
    assert torch.equal(rope.inverse_frequencies(), wanted)
    assert rope.mscale() == 1.0


def test_llama3_factors_divide_the_frequencies():
    parameters = {
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    }
    wanted, _ = transformers_rope(64, rope_type="llama3", **parameters)
    rope = RopeConfig(style="norm", dim=64, theta=500_000.0)
    factors = rope.inverse_frequencies() / wanted
    assert len(factors.unique()) > 3, "some kept, some stretched, some between"
    torch.testing.assert_close(rope.inverse_frequencies(factors), wanted, rtol=1e-6, atol=0)


def test_scaling_none_ignores_the_factor():
    plain = RopeConfig(style="norm", dim=64, theta=5000.0)
    scaled = RopeConfig(style="norm", dim=64, theta=5000.0, scaling="none", factor=4.0)
    assert torch.equal(plain.inverse_frequencies(), scaled.inverse_frequencies())


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("style", ["norm", "neox"])
def test_rotation_and_storing(style, normed):
    tokens, dim = 6, 16
    q, k = torch.randn(tokens, 4, dim), torch.randn(tokens, 2, dim)
    v = torch.randn(tokens, 2, 8)
    positions = torch.tensor([0, 1, 2, 30, 31, 500])
    slots = torch.tensor([17, 3, 4, 31, 0, 9])
    pages = torch.full((2, 16, 2, dim), torch.nan), torch.full((2, 16, 2, 8), torch.nan)
    norms = HeadNorms(torch.rand(dim), torch.rand(dim), 1e-3) if normed else None
    config = RopeConfig(
        style=style, dim=dim, theta=500.0, scaling="yarn", factor=2.0, original_context=64
    )
    rope = RotaryEmbedding(config)
    rotated = rope(q, k, v, positions, pages, slots, norms)

    if norms is not None:
        q, k = (
            torch.nn.functional.rms_norm(x, (dim,), weight, norms.eps)
            for x, weight in ((q, norms.q), (k, norms.k))
        )
    angles = positions[:, None].float() * config.inverse_frequencies().repeat(2)
    cos, sin = angles.cos() * config.mscale(), angles.sin() * config.mscale()
    # transformers rotates halves: bring neighbours there and back
    order = torch.arange(dim)
    if style == "norm":
        order = torch.cat([order[0::2], order[1::2]])
    wanted_q, wanted_k = apply_rotary_pos_emb(q[..., order], k[..., order], cos, sin)
    back = order.argsort()
    torch.testing.assert_close(rotated, wanted_q[..., back])
    torch.testing.assert_close(pages[0].flatten(0, 1)[slots], wanted_k[..., back])
    assert torch.equal(pages[1].flatten(0, 1)[slots], v)
    assert pages[0].flatten(0, 1).isnan().all(-1).all(-1).sum() == 32 - tokens
