"""kernels/embedding. Oracle: rows of gguf-py's dequantize."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.embedding.op import embedding
from oxillama_torch.kernels.registry import use_kernels
from tests.support.blocks import TYPES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IDS = torch.tensor([36, 0, 5, 5, 1])


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_equal_gguf_py(type_name, dtype, backend, pack):
    weight, truth = pack(type_name, 37, 512)
    with use_kernels(f"embedding={backend}"):
        got = embedding(IDS.to(DEVICE), weight.to(DEVICE), dtype)
    assert got.dtype == dtype
    tolerance = 0.0
    if backend == "triton" and DEVICE == "cuda":
        tolerance = torch.finfo(dtype).eps  # a decoder's a * b - c may be rounded once, not twice
    elif backend == "triton" and dtype == torch.bfloat16:
        tolerance = 2**-7  # the interpreter truncates where a GPU rounds
    wanted = truth[IDS].float().to(dtype)
    torch.testing.assert_close(got.cpu(), wanted, rtol=tolerance, atol=tolerance * 1e-3)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_rows_without_blocks_may_have_any_length(k, backend, pack):
    weight, truth = pack("F32", 37, k)
    with use_kernels(f"embedding={backend}"):
        assert torch.equal(embedding(IDS.to(DEVICE), weight.to(DEVICE)).cpu(), truth[IDS].float())


def test_no_ids(pack):
    weight, _ = pack("Q8_0", 37, 512)
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
def test_bad_operands_are_named(ids, dtype, message, pack):
    weight, _ = pack("Q8_0", 37, 512)
    with pytest.raises(ValueError, match=message):
        embedding(ids, weight, dtype)
