"""kernels/quant_matmul/reference.py and op.py. Oracle: gguf-py's dequantize, float64 products."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.quant_matmul import reference
from oxillama_torch.kernels.quant_matmul.op import quant_matmul, quant_matmul_experts
from oxillama_torch.kernels.registry import use_kernels
from tests.support.blocks import TYPES

# The last are the keys of Llama 3.2 1B.
SHAPES = [(1, 1, 256), (3, 96, 512), (15, 65, 256), (16, 31, 256), (33, 130, 768), (2, 512, 2048)]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def reference_backend():
    with use_kernels("quant_matmul=reference,quant_matmul_experts=reference"):
        yield


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("m, n, k", SHAPES, ids=["M{}-N{}-K{}".format(*shape) for shape in SHAPES])
def test_equals_product_with_gguf_py_values(type_name, m, n, k, pack, activations, assert_close):
    weight, values = pack(type_name, n, k)
    x = activations(m, k)
    assert_close(quant_matmul(x, weight), x, values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_result_keeps_the_dtype_and_bias_is_added_before_rounding(
    dtype, pack, activations, assert_close
):
    weight, values = pack("Q4_K", 40, 512)
    x, bias = activations(5, 512, dtype), torch.randn(40)
    y = quant_matmul(x, weight, bias)
    assert y.dtype == dtype
    assert_close(y, x, values, bias)


def test_rows_without_blocks_may_have_any_length(pack, activations, assert_close):
    weight, values = pack("F32", 7, 5)
    x = activations(3, 5)
    assert_close(quant_matmul(x, weight), x, values)


def test_chunks_of_a_large_weight_meet(monkeypatch, pack, activations, assert_close):
    monkeypatch.setattr(reference, "_CHUNK_WEIGHTS", 130 * 256)
    weight, values = pack("Q8_0", 300, 256)  # chunks of 128, 128 and 44
    x = activations(2, 256)
    assert_close(quant_matmul(x, weight), x, values)


@pytest.fixture(params=[1, 2], ids=["threads1", "threads2"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("n, k", [(96, 256), (600, 2048)])
def test_bits_of_a_row_do_not_depend_on_the_batch(
    type_name, dtype, n, k, threads, pack, activations
):
    weight, _ = pack(type_name, n, k)
    x = activations(64, k, dtype)
    whole = quant_matmul(x, weight)
    for start, stop in [(0, 1), (1, 3), (5, 12), (7, 23), (16, 33), (0, 63), (63, 64)]:
        assert torch.equal(quant_matmul(x[start:stop], weight), whole[start:stop]), (start, stop)
    shuffled = torch.randperm(64)
    assert torch.equal(quant_matmul(x[shuffled], weight), whole[shuffled])


@pytest.mark.parametrize("n", [24, 40, 130], ids="n{}".format)
@pytest.mark.parametrize("k", [512, 8192], ids="k{}".format)
def test_bits_do_not_depend_on_threads(n, k, pack, activations):
    """MKL's own do at 24 and 40 outputs, from 3 threads on."""
    weight, _ = pack("Q8_0", n, k)
    x = activations(20, k)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(quant_matmul(x, weight))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("type_name", ["F32", "Q4_K"])
def test_experts_equal_their_own_products(type_name, pack, activations, assert_close):
    experts, n, k = 4, 24, 256
    weight, values = pack(type_name, experts * n, k)
    ids = torch.tensor([2, 0, 2, 2, 0, 2, 3] * 5)  # expert 1 gets nothing; 2 gets more than a tile
    x = activations(len(ids), k)
    y = quant_matmul_experts(x, weight, ids, experts)
    for expert in ids.unique():
        chosen = ids == expert
        assert_close(y[chosen], x[chosen], values.view(experts, n, k)[expert])
    for i in (0, 1, 6, 34):
        alone = quant_matmul_experts(x[i : i + 1], weight, ids[i : i + 1], experts)
        assert torch.equal(alone[0], y[i])
        single = quant_matmul(x[i : i + 1], weight.rows(ids[i] * n, (ids[i] + 1) * n))
        assert torch.equal(single[0], y[i])


def test_no_rows(pack):
    weight, _ = pack("Q8_0", 8, 64)
    empty = torch.zeros(0, 64, dtype=torch.bfloat16)
    assert quant_matmul(empty, weight).shape == (0, 8)
    ids = torch.zeros(0, dtype=torch.int64)
    assert quant_matmul_experts(empty, weight, ids, 2).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 63)}, r"x: got shape \(2, 63\), wanted \(M, 64\)"),
        ({"x": torch.zeros(64)}, r"x: got shape \(64,\), wanted \(M, 64\)"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "x: got torch.float64, wanted one of"),
        ({"x": torch.zeros(2, 64, device="meta")}, "plane 'qs': got device cpu, wanted meta"),
        ({"bias": torch.zeros(7)}, r"bias: got shape \(7,\), wanted \(8,\)"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, "bias: got torch.int64 on cpu"),
    ],
    ids=["x-length", "x-rank", "x-dtype", "x-device", "bias-shape", "bias-dtype"],
)
def test_bad_operands_are_named(change, message, pack):
    weight, _ = pack("Q8_0", 8, 64)
    with pytest.raises(ValueError, match=message):
        quant_matmul(**{"x": torch.zeros(2, 64), "weight": weight, **change})


@pytest.mark.parametrize(
    ("ids", "experts", "message"),
    [
        (torch.tensor([0, 1]), 3, "got 8 rows, wanted a multiple of num_experts = 3"),
        (torch.tensor([0, 1]), 0, "num_experts = 0"),
        (torch.tensor([0]), 2, r"expert_ids: got torch.int64 \(1,\), wanted torch.int64 \(2,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), 2, "expert_ids: got torch.int32"),
        (torch.tensor([0, 2]), 2, "expert_ids: got 2, wanted 0 to 1"),
    ],
)
def test_bad_experts_are_named(ids, experts, message, pack):
    weight, _ = pack("Q8_0", 8, 64)
    with pytest.raises(ValueError, match=message):
        quant_matmul_experts(torch.zeros(2, 64), weight, ids, experts)


def test_unknown_backend_lists_the_known_ones():
    with (
        pytest.raises(UnsupportedError, match="supported: .*reference"),
        use_kernels("quant_matmul=refrence"),
    ):
        pass
