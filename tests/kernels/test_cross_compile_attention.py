"""Attention, norm, rope and activation kernels compile for every GPU generation without spills.

Oracle: ptxas and the disassembler of Triton's wheel.
"""

from __future__ import annotations

import pytest

from oxillama_torch.bench.cross_compile import TARGETS, Report, cross_compile, table

KERNELS = "oxillama_torch.kernels"
ATTENTION = f"{KERNELS}.attention.variants:variants"
ROWWISE = {
    "norm": f"{KERNELS}.norm.triton_rms_norm:variants",
    "layer-norm": f"{KERNELS}.norm.triton_layer_norm:variants",
    "rope": f"{KERNELS}.rope.triton_rope_store_kv:variants",
    "activation": f"{KERNELS}.activation.triton_gated:variants",
}
# The least that a program may have in the GPUs compiled for: 99 KiB, on sm_120.
SHARED_BYTES = 99 << 10
pytestmark = pytest.mark.timeout(900)


def assert_clean(reports: list[Report], outside_loop: int = 0) -> None:
    """No local memory, but for ``outside_loop`` bytes that the hot loop does not touch.

    ptxas spills a few registers of its own accord where that lets a second program onto a
    multiprocessor.
    """
    dirty = [
        r
        for r in reports
        if r.local_bytes > outside_loop
        or {"LDL", "STL"} & set(r.opcodes)
        or r.shared_bytes > SHARED_BYTES
    ]
    assert reports and not dirty, f"local memory, or too much shared memory:\n{table(dirty)}"


def compile_attention(target: int, models: str) -> list[Report]:
    """The variants of the models that run on a target."""
    large = "" if target in (90, 100) else "(?!.*-large-)"
    return cross_compile(ATTENTION, [target], match=f"^{large}.*-({models})$")


@pytest.mark.parametrize("target", TARGETS)
def test_attention_with_every_flag(target):
    assert_clean(compile_attention(target, "g4-d128-flags"))


def test_attention_of_other_models_on_hopper():
    reports = compile_attention(90, "g4-d128|g1-d64|g4-d128-f32|g1-d128-slopes")
    assert_clean(reports, outside_loop=32)
    units = {report.name: report.opcodes for report in reports}
    # Tiles of 64 and more rows use warp-group MMA, smaller ones the MMA of a single warp.
    assert units["prefill-fast-large-g4-d128"]["HGMMA"] > 0
    assert units["prefill-invariant-g4-d128"]["HMMA"] > 0
    assert units["decode-fast-split-g4-d128"]["HMMA"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_attention_of_all_models(target):
    assert_clean(compile_attention(target, ".*"), outside_loop=32)


@pytest.mark.parametrize("op", ROWWISE)
def test_rowwise_kernels(op):
    assert_clean(cross_compile(ROWWISE[op], TARGETS))
