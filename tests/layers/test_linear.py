"""Linear and embedding layers. Oracle: gguf-py's dequantization and float32 torch."""

from __future__ import annotations

import gguf
import pytest
import torch

from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.layers.linear import Embedding, LinearGroup, QuantLinear

KINDS = ["F32", "F16", "Q8_0", "Q4_0"]


def packed(type_name: str, rows: int, columns: int) -> tuple[PackedTensor, torch.Tensor]:
    """A random weight and its exact values."""
    kind = gguf.GGMLQuantizationType[type_name]
    blocks = gguf.quants.quantize(torch.randn(rows, columns).numpy(), kind)
    values = torch.from_numpy(gguf.quants.dequantize(blocks, kind).astype("float32"))
    data = torch.from_numpy(blocks).contiguous().view(torch.uint8).flatten()
    return PackedTensor.from_bytes(type_name, data, (rows, columns)), values


@pytest.mark.parametrize("type_name", KINDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_linear(type_name, has_bias):
    weight, values = packed(type_name, 70, 64)
    bias = torch.randn(70) if has_bias else None
    layer, x = QuantLinear(weight, bias), torch.randn(5, 64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, values, bias))
    assert (layer.in_features, layer.out_features) == (64, 70)


def test_group_gives_each_part_its_rows():
    one, one_values = packed("Q8_0", 40, 64)
    two, two_values = packed("F16", 24, 64)
    group = LinearGroup(
        [QuantLinear(one, parts={"q": 30, "k": 10}), QuantLinear(two, parts={"v": 24})]
    )
    x = torch.randn(3, 64)
    q, k, v = group(x)
    torch.testing.assert_close(q, x @ one_values[:30].T)
    torch.testing.assert_close(k, x @ one_values[30:].T)
    torch.testing.assert_close(v, x @ two_values.T)


@pytest.mark.parametrize("type_name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_embedding(type_name, dtype):
    table, values = packed(type_name, 37, 64)
    ids = torch.tensor([36, 0, 5, 5])
    assert torch.equal(Embedding(table, dtype)(ids), values[ids].to(dtype))
    assert torch.equal(Embedding(table, dtype, scale=3.0)(ids), values[ids].to(dtype) * 3.0)


def test_modules_name_their_tensors():
    weight, _ = packed("Q8_0", 4, 32)
    layer = QuantLinear(weight, torch.zeros(4), parts={"blk.0.attn_q": 4})
    assert "blk.0.attn_q: 32 -> 4, Q8_0, bias" in repr(layer)
