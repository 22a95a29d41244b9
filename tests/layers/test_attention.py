"""The attention layer over pages. Oracle: torch's scaled_dot_product_attention in one piece."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.layers.attention import Attention, ForwardBatch
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.layers.rope import HeadNorms, RopeConfig, RotaryEmbedding

HIDDEN, HEADS, KV_HEADS, DIM, TOKENS = 40, 6, 2, 8, 21


def linear(rows: int, columns: int) -> tuple[QuantLinear, torch.Tensor]:
    values = torch.randn(rows, columns) / columns**0.5
    data = values.view(torch.uint8).flatten()
    return QuantLinear(PackedTensor.from_bytes("F32", data, (rows, columns))), values


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("window", [None, 5])
def test_equals_dense_attention(window, normed):
    (q, wq), (k, wk), (v, wv), (o, wo) = (
        linear(HEADS * DIM, HIDDEN),
        linear(KV_HEADS * DIM, HIDDEN),
        linear(KV_HEADS * DIM, HIDDEN),
        linear(HIDDEN, HEADS * DIM),
    )
    norms = HeadNorms(torch.rand(DIM), torch.rand(DIM), 1e-6) if normed else None
    rope = RotaryEmbedding(RopeConfig(style="neox", dim=DIM, theta=2.0))
    rope.inv_freq.zero_()  # no rotation: that is test_rope's subject
    layer = Attention(
        qkv=LinearGroup([q, k, v]), output=o, rope=rope, norms=norms, scale=0.3, window=window,
        num_heads=HEADS, num_kv_heads=KV_HEADS,
    )  # fmt: skip
    x = torch.randn(TOKENS, HIDDEN)
    pages = torch.zeros(2, 16, KV_HEADS, DIM), torch.zeros(2, 16, KV_HEADS, DIM)
    y = layer(x, one_request(), pages)

    queries, keys, values = ((x @ w.T).view(TOKENS, -1, DIM).transpose(0, 1) for w in (wq, wk, wv))
    if norms is not None:
        queries = torch.nn.functional.rms_norm(queries, (DIM,), norms.q, norms.eps)
        keys = torch.nn.functional.rms_norm(keys, (DIM,), norms.k, norms.eps)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    seen = (distance >= 0) & (distance < (window or TOKENS))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(y, wanted.transpose(0, 1).flatten(1) @ wo.T)


def one_request() -> ForwardBatch:
    """All tokens at once, on pages 1 and 0."""
    positions = torch.arange(TOKENS)
    return ForwardBatch(
        input_ids=positions,
        positions=positions,
        slot_mapping=torch.where(positions < 16, positions + 16, positions - 16),
        page_table=torch.tensor([[1, 0]], dtype=torch.int32),
        query_start=torch.tensor([0, TOKENS], dtype=torch.int32),
        seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
        max_query_len=TOKENS,
        max_seq_len=TOKENS,
        logits_rows=positions,
    )
