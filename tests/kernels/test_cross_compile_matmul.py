"""The matmul and embedding kernels compile for every GPU generation, within their budgets.

Oracle: ptxas and the disassembler of Triton's wheel.
"""

from __future__ import annotations

import pytest

from oxillama_torch.bench.cross_compile import TARGETS, Report, cross_compile, table
from oxillama_torch.kernels.quant_matmul.variants import BUDGETS, DP4A_BUDGETS

SOURCE = "oxillama_torch.kernels.quant_matmul.variants:variants"
OTHER_TARGETS = [target for target in TARGETS if target != 90]
BUDGETED = ("gemv", "gemm16")
KERNELS = (*BUDGETED, "dp4a")
# One blocked type with a scale and one with a scale and a minimum stand for the rest elsewhere.
EVERYWHERE = ("q8_0", "q4_k")
# Bytes of shared memory a program may have (CUDA C++ Programming Guide, compute capabilities).
# Code for sm_80 also runs on sm_86 and sm_89, which have least.
SHARED_LIMITS = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
# Compilation of all variants belongs to the first test that asks for them.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def hopper() -> dict[str, Report]:
    """name -> report, sm_90: all types with the kernels that dominate, two with every kernel."""
    match = f"^({'|'.join(KERNELS)})-({'|'.join(BUDGETS)})$|-({'|'.join(EVERYWHERE)})$"
    return {report.name: report for report in cross_compile(SOURCE, [90], match=match)}


def test_all_types_compile_without_spills(hopper):
    expected = {f"{kernel}-{name}" for kernel in BUDGETED for name in BUDGETS}
    assert expected <= set(hopper)
    _assert_clean(hopper.values())


def test_two_types_compile_everywhere_without_spills():
    kernels = "|".join((*KERNELS, "gemm128"))
    match = f"^({kernels})-({'|'.join(EVERYWHERE)})$|^gemm128-f32$"
    reports = cross_compile(SOURCE, OTHER_TARGETS, match=match)
    assert {report.capability for report in reports} == set(OTHER_TARGETS)
    _assert_clean(reports)


def test_fused_products_cost_what_single_ones_do(hopper):
    """Per weight; the integer form of a type with few registers loses some to the second sum."""
    single = {"gated16": "gemm16", "gated-dp4a": "dp4a"}
    single |= {f"residual-{kernel}": kernel for kernel in KERNELS}
    compared = 0
    for name, report in hopper.items():
        kernel, _, type_name = name.rpartition("-")
        if kernel in single:
            compared += 1
            assert report.per_weight <= 1.25 * hopper[f"{single[kernel]}-{type_name}"].per_weight
    assert compared == 2 * len(EVERYWHERE) + len(KERNELS)
    _assert_clean(cross_compile(SOURCE, [90], match="^segments"))
    match = f"^(gated16|gated-dp4a)-({'|'.join(EVERYWHERE)})$|^segments"
    _assert_clean(cross_compile(SOURCE, OTHER_TARGETS, match=match))


def _assert_clean(reports) -> None:
    dirty = [report for report in reports if report.spills or report.local_bytes]
    assert not dirty, f"local memory is used:\n{table(dirty)}"
    large = [report for report in reports if report.shared_bytes > SHARED_LIMITS[report.capability]]
    assert not large, f"more shared memory than there is:\n{table(large)}"


@pytest.mark.parametrize("type_name", BUDGETS)
def test_instructions_per_weight_stay_in_budget(type_name, hopper):
    for kernel, budget in zip(BUDGETED, BUDGETS[type_name]):
        report = hopper[f"{kernel}-{type_name}"]
        assert report.per_weight <= budget, f"budget {budget}\n{table([report])}"


@pytest.mark.parametrize("type_name", DP4A_BUDGETS)
def test_integer_products_stay_in_budget_and_use_the_instruction(type_name, hopper):
    report, budget = hopper[f"dp4a-{type_name}"], DP4A_BUDGETS[type_name]
    assert report.per_weight <= budget, f"budget {budget}\n{table([report])}"
    assert report.opcodes["IDP"] >= 64  # 256 weights a thread and turn, four to an instruction


def test_weights_reach_the_tensor_cores_from_registers(hopper):
    """Warp-group MMA on Hopper, and no store of single decoded weights to shared memory."""
    for name in EVERYWHERE:
        report = hopper[f"gemm16-{name}"]
        assert report.opcodes["HGMMA"] == 8  # K tile of 128 in steps of 16
        assert report.opcodes.get("STS", 0) < 64
