"""Every type compiles for every GPU generation without spills; takes minutes, so ``-m slow``.

test_cross_compile_matmul.py has all types on one generation, and two types on all.
Oracle: ptxas and the disassembler of Triton's wheel.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from oxillama_torch.bench.cross_compile import TARGETS, cross_compile, table  # noqa: E402
from oxillama_torch.kernels.quant_matmul.variants import BUDGETS  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SOURCE = "oxillama_torch.kernels.quant_matmul.variants:variants"


@pytest.mark.parametrize("target", sorted({*TARGETS} - {90}), ids="sm{}".format)
@pytest.mark.parametrize("kernel", ["gemv", "gemm16"])
def test_no_spills(kernel, target):
    reports = cross_compile(SOURCE, [target], match=f"^{kernel}-", timeout_s=1800)
    assert len(reports) == len(BUDGETS)
    spilled = [report for report in reports if report.local_bytes or report.spills]
    assert not spilled, table(spilled)
