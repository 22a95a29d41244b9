"""kernels/embedding. Oracle: rows of gguf-py's dequantize."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from oxillama_torch.kernels.embedding.op import embedding
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.registry import use_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IDS = torch.tensor([36, 0, 5, 5, 1])


def table(type_name: str, rows: int = 37, columns: int = 512) -> tuple[PackedTensor, torch.Tensor]:
    qtype = gguf.GGMLQuantizationType[type_name]
    rng = np.random.default_rng(0)
    if type_name == "Q6_K":  # gguf-py cannot encode it: random blocks with sane scales
        data = rng.integers(0, 256, (rows, columns // 256, 210), dtype=np.uint8)
        data[..., -2:] = np.float16(0.01).reshape(1).view(np.uint8)
        data = data.reshape(rows, -1)
    else:
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        data = gguf.quants.quantize(values, qtype).view(np.uint8).reshape(rows, -1)
    truth = torch.from_numpy(gguf.quants.dequantize(data, qtype).copy())
    packed = PackedTensor.from_bytes(
        type_name, torch.from_numpy(data.copy()).flatten(), truth.shape
    )
    return packed, truth


@pytest.mark.parametrize("type_name", ["F32", "BF16", "Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_equal_gguf_py(type_name, dtype):
    weight, truth = table(type_name)
    with use_kernels("embedding=reference"):
        got = embedding(IDS, weight, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, truth[IDS].to(dtype))


def test_no_ids():
    weight, _ = table("Q8_0")
    assert embedding(IDS[:0], weight, torch.float16).shape == (0, 512)


@pytest.mark.parametrize(
    ("ids", "dtype", "message"),
    [
        (IDS.int(), torch.float32, r"ids: got torch.int32 \(5,\), wanted torch.int64 \(T,\)"),
        (IDS[None], torch.float32, r"ids: got torch.int64 \(1, 5\)"),
        (IDS, torch.int8, "dtype: got torch.int8, wanted a floating dtype"),
        (IDS.to("meta"), torch.float32, "plane 'qs': got device cpu, wanted meta like ids"),
    ],
)
def test_bad_operands_are_named(ids, dtype, message):
    weight, _ = table("Q8_0")
    with pytest.raises(ValueError, match=message):
        embedding(ids, weight, dtype)
