"""The Triton matmuls: interpreted on a CPU, compiled where there is a GPU.

Oracle: gguf-py's dequantize, float64 products. Tiles are set small here, so that a few programs
meet every border; the configs used on a GPU are compiled in test_cross_compile_matmul.py.
"""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels import formats
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.quant_matmul import triton_experts, triton_gemm, triton_gemv
from oxillama_torch.kernels.quant_matmul.configs import Config, block_k
from oxillama_torch.kernels.quant_matmul.op import quant_matmul, quant_matmul_experts
from oxillama_torch.kernels.registry import use_kernels
from tests.support.blocks import TYPES as ALL_TYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEMM = Config(16, 32, 128, num_warps=4)
GEMV = Config(1, 8, 256, num_warps=2)
# What each product may be off by: on a GPU the weights are rounded to the dtype of x.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
if DEVICE == "cpu":
    ROUNDING = dict.fromkeys(ROUNDING, 2e-6)
TYPES = [name.lower() for name in ALL_TYPES]
pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]


def ids(shape: tuple[int, int, int]) -> str:
    return "M{}-N{}-K{}".format(*shape)


def run(launch, config: Config, x: torch.Tensor, weight: PackedTensor, bias=None) -> torch.Tensor:
    bias = bias if bias is None else bias.to(DEVICE)
    return launch(x.to(DEVICE), weight.to(DEVICE), bias, config).cpu()


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize(
    "shape", [(1, 96, 512), (15, 31, 256), (16, 32, 256), (17, 33, 768)], ids=ids
)
def test_gemm(type_name, shape, pack, activations, assert_close):
    m, n, k = shape
    weight, values = pack(type_name.upper(), n, k)
    x = activations(m, k)
    assert_close(run(triton_gemm.launch, GEMM, x, weight), x, values)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 8, 512), (2, 9, 1024), (1, 31, 768)], ids=ids)
def test_gemv(type_name, shape, pack, activations, assert_close):
    m, n, k = shape
    weight, values = pack(type_name.upper(), n, k)
    x = activations(m, k)
    assert_close(run(triton_gemv.launch, GEMV, x, weight), x, values)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("backend", ["triton.gemv", "triton.gemm", "triton.invariant"])
def test_keys_of_a_model_of_1b(backend, type_name, pack, activations, assert_close):
    """Llama 3.2's: 512 outputs, 2,048 inputs; with the tiles that the op itself chooses."""
    weight, values = pack(type_name.upper(), 512, 2048)
    x = activations(2, 2048)
    with use_kernels(f"quant_matmul={backend}"):
        y = quant_matmul(x.to(DEVICE), weight.to(DEVICE), numerics="fast")
    assert_close(y, x, values)


@pytest.mark.parametrize("launch, config", [(triton_gemm.launch, GEMM), (triton_gemv.launch, GEMV)])
@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "q5_1"])
@pytest.mark.parametrize("k", [32, 96, 160])
def test_rows_of_few_blocks(launch, config, type_name, k, pack, activations, assert_close):
    weight, values = pack(type_name.upper(), 12, k)
    x = activations(2, k)
    assert_close(run(launch, config, x, weight), x, values)


@pytest.mark.parametrize("launch, config", [(triton_gemm.launch, GEMM), (triton_gemv.launch, GEMV)])
@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("k", [1, 15, 130, 257])
def test_rows_without_blocks_may_have_any_length(
    launch, config, type_name, k, pack, activations, assert_close
):
    weight, values = pack(type_name.upper(), 12, k)
    x = activations(2, k)
    assert_close(run(launch, config, x, weight), x, values)


@pytest.mark.parametrize("launch, config", [(triton_gemm.launch, GEMM), (triton_gemv.launch, GEMV)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision_and_bias(launch, config, dtype, pack, activations, assert_close):
    weight, values = pack("Q4_K", 40, 512)
    x, bias = activations(2, 512, dtype), torch.randn(40)
    y = run(launch, config, x, weight, bias)
    assert y.dtype == dtype
    assert_close(y, x, values, bias, ROUNDING[dtype])


@pytest.mark.parametrize("launch, config", [(triton_gemm.launch, GEMM), (triton_gemv.launch, GEMV)])
def test_x_may_be_a_view(launch, config, pack, activations, assert_close):
    weight, values = pack("Q8_0", 12, 64)
    wide = activations(2, 200)
    assert_close(run(launch, config, wide[:, 72:136], weight), wide[:, 72:136], values)
    tall = activations(64, 2).T
    assert_close(run(launch, config, tall, weight), tall, values)


@pytest.mark.parametrize("launch, config", [(triton_gemm.launch, GEMM), (triton_gemv.launch, GEMV)])
def test_nothing_beyond_the_operands_is_used(launch, config, activations, assert_close):
    """The weight is a window in a table of NaN, and x a window in another."""
    table = torch.full((64, 48), float("nan"))
    table[8:43, :37] = torch.randn(35, 37)
    weight = PackedTensor(formats.get("F32"), (35, 37), {"w": table[8:43, :37]})
    x = torch.full((9, 48), float("nan"))
    x[3:5, :37] = activations(2, 37)
    got = launch(x.to(DEVICE)[3:5, :37], _on_device(weight), None, config)
    assert_close(got, x[3:5, :37], table[8:43, :37].double())


def _on_device(weight: PackedTensor) -> PackedTensor:
    whole = weight.planes["w"]._base.to(DEVICE)
    return PackedTensor(weight.format, weight.shape, {"w": whole[8:43, :37]})


@pytest.mark.parametrize("type_name", ["f32", "q8_0", "q4_k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_invariant_bits_do_not_depend_on_the_batch(type_name, dtype, pack, activations):
    weight = pack(type_name.upper(), 70, 768)[0].to(DEVICE)
    x = activations(40, 768, dtype).to(DEVICE)
    with use_kernels("quant_matmul=triton.invariant"):
        whole = quant_matmul(x, weight)
        for start, stop in [(0, 1), (1, 3), (5, 12), (15, 33), (39, 40)]:
            part = quant_matmul(x[start:stop], weight)
            assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("numerics", ["fast", "invariant"])
@pytest.mark.parametrize("m", [1, 4, 5, 33])
def test_the_family_serves_every_number_of_rows(m, numerics, pack, activations, assert_close):
    weight, values = pack("Q8_0", 24, 64)
    x = activations(m, 64)
    with use_kernels("quant_matmul=triton"):
        y = quant_matmul(x.to(DEVICE), weight.to(DEVICE), numerics=numerics)
    # Few rows are multiplied with 8-bit activations in fast numerics.
    assert_close(y, x, values, rounding=2e-2 if numerics == "fast" and m <= 4 else 2e-6)


@pytest.mark.parametrize("type_name", TYPES)
def test_experts(type_name, pack, activations, assert_close):
    experts, n, k = 5, 40, 256
    weight, values = pack(type_name.upper(), experts * n, k)
    # Expert 1 gets nothing, 2 more than one tile, 4 exactly one.
    ids = torch.tensor([2] * 19 + [4] * 16 + [0, 3, 0])[torch.randperm(38)]
    x = activations(len(ids), k)
    with use_kernels("quant_matmul_experts=triton"):
        y = quant_matmul_experts(x.to(DEVICE), weight.to(DEVICE), ids.to(DEVICE), experts)
        alone = quant_matmul_experts(
            x[7:8].to(DEVICE), weight.to(DEVICE), ids[7:8].to(DEVICE), experts
        )
    assert torch.equal(alone[0], y[7])
    for expert in ids.unique():
        chosen = ids == expert
        assert_close(y.cpu()[chosen], x[chosen], values.view(experts, n, k)[expert])


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("experts", [1, 3, 16])
@pytest.mark.parametrize("block_m", [1, 4, 16])
def test_plan_covers_each_row_once_with_its_expert(rows, experts, block_m):
    expert_ids = torch.randint(0, experts, (rows,))
    order, tile_expert, tile_start, expert_start = triton_experts.plan_tiles(
        expert_ids, experts, block_m
    )
    seen = []
    for expert, start in zip(tile_expert.tolist(), tile_start.tolist()):
        if expert < experts:
            places = range(start, min(start + block_m, int(expert_start[expert + 1])))
            assert len(places) > 0, "an empty tile is launched as a real one"
            assert all(expert_ids[order[place]] == expert for place in places)
            seen += [int(order[place]) for place in places]
    assert sorted(seen) == list(range(rows))


@pytest.mark.parametrize(
    ("type_name", "k", "most", "expected"),
    [
        ("Q8_0", 4096, 128, 128),
        ("Q8_0", 96, 128, 32),
        ("Q4_K", 768, 128, 128),
        ("Q4_K", 768, 512, 256),
        ("F32", 5, 128, 16),
        ("F32", 100, 128, 128),
        ("BF16", 4096, 64, 64),
    ],
)
def test_k_tiles_divide_the_row_or_are_masked(type_name, k, most, expected):
    assert block_k(formats.get(type_name), k, most) == expected
