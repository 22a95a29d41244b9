"""Every type compiles for every GPU generation, no loop spills; takes minutes, so ``-m slow``.

test_cross_compile_matmul.py has all types on one generation, and two types on all.
Oracle: ptxas and the disassembler of Triton's wheel.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from oxillama_torch.bench.cross_compile import TARGETS, cross_compile, table  # noqa: E402
from oxillama_torch.kernels.quant_matmul.variants import BUDGETS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
OUTSIDE_LOOP = 32  # bytes of local memory
SOURCE = "oxillama_torch.kernels.quant_matmul.variants:variants"


@pytest.mark.parametrize("target", sorted({*TARGETS} - {90}), ids="sm{}".format)
@pytest.mark.parametrize("kernel", ["gemv", "gemm16"])
def test_no_spills(kernel, target):
    """None in the hot loop; outside of it ptxas may spill a few registers of its own accord."""
    reports = cross_compile(SOURCE, [target], match=f"^{kernel}-", timeout_s=1800)
    assert len(reports) == len(BUDGETS)
    dirty = [r for r in reports if r.local_bytes > OUTSIDE_LOOP or {"LDL", "STL"} & {*r.opcodes}]
    assert not dirty, table(dirty)
