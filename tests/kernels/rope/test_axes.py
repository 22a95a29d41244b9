"""Rotation by several positions per token. Oracle: transformers' Qwen2-VL and Qwen3-VL."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextRotaryEmbedding,
    apply_rotary_pos_emb,
)

from oxillama_torch.kernels.registry import use_kernels
from oxillama_torch.kernels.rope.op import rope_store_kv, section_axes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HQ, HKV, DIM, THETA = 4, 2, 64, 50_000.0
# Text, where the positions are one, an image of 2 x 3 patches, and text again.
POSITIONS = torch.tensor(
    [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 4000],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 4000],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 4000],
    ]
)
CASES = {
    "sections": (Qwen2VLRotaryEmbedding, Qwen2VLTextConfig, [8, 12, 12], False),
    "interleaved": (Qwen3VLTextRotaryEmbedding, Qwen3VLTextConfig, [12, 10, 10], True),
}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(backend, q, k, axes, positions=POSITIONS):
    """(rotated q, rotated k)."""
    tokens = q.shape[0]
    pages = torch.zeros(1, 16, HKV, DIM, device=DEVICE), torch.zeros(1, 16, HKV, 8, device=DEVICE)
    v = torch.zeros(tokens, HKV, 8, device=DEVICE)
    inv_freq = 1.0 / THETA ** (torch.arange(0, DIM, 2).float() / DIM)
    with use_kernels(f"rope_store_kv={backend}"):
        out = rope_store_kv(
            q.to(DEVICE), k.to(DEVICE), v, positions.to(DEVICE), inv_freq.to(DEVICE), 1.0, "neox",
            *pages, torch.arange(tokens, device=DEVICE), axes=axes.to(DEVICE),
        )  # fmt: skip
    return out.cpu(), pages[0][0, :tokens].cpu()


def by_transformers(embedding, make_config, sections, q, k):
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": sections}
    config = make_config(
        hidden_size=HQ * DIM, num_attention_heads=HQ, head_dim=DIM, rope_parameters=rope
    )
    cos, sin = embedding(config)(q, POSITIONS[:, None])
    turned = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return tuple(x[0].transpose(0, 1) for x in turned)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_transformers(backend, case):
    embedding, make_config, sections, interleaved = case
    q, k = torch.randn(10, HQ, DIM), torch.randn(10, HKV, DIM)
    wanted = by_transformers(embedding, make_config, sections, q, k)
    got = run(backend, q, k, section_axes(sections, interleaved=interleaved))
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine, theirs, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_equal_positions_are_one_position(backend):
    """Text: the same bits as without axes."""
    q, k = torch.randn(3, HQ, DIM), torch.randn(3, HKV, DIM)
    positions = torch.tensor([7, 0, 99]).expand(3, 3).contiguous()
    axes = section_axes([8, 12, 12])
    first = run(backend, q, k, axes, positions)
    other = run(backend, q, k, torch.zeros_like(axes), positions[:1].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(first, other))


def test_axes_of_sections():
    assert section_axes([2, 1, 0, 3]).tolist() == [0, 0, 1, 3, 3, 3]
    assert section_axes([3, 2, 1], interleaved=True).tolist() == [0, 1, 2, 0, 1, 0]
    with pytest.raises(ValueError, match="cannot take turns"):
        section_axes([1, 4, 1], interleaved=True)
    with pytest.raises(ValueError, match="wanted none below 0"):
        section_axes([2, -1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": torch.zeros(31, dtype=torch.int64)}, r"axes: got torch.int64 \(31,\)"),
        ({"axes": torch.zeros(32)}, "axes: got torch.float32"),
        ({"positions": POSITIONS[0]}, r"positions: got \(10,\), wanted \(A, 10\)"),
        ({"positions": POSITIONS[:, :4]}, r"positions: got torch.int64 \(3, 4\)"),
    ],
)
def test_bad_operands_are_named(change, message):
    arguments = {"axes": section_axes([8, 12, 12]), "positions": POSITIONS} | change
    q, k = torch.randn(10, HQ, DIM), torch.randn(10, HKV, DIM)
    with pytest.raises(ValueError, match=message):
        run("reference", q, k, **arguments)
