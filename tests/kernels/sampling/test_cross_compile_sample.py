"""The sampler's kernels compile for every GPU generation without spills.

Oracle: ptxas and the disassembler of Triton's wheel.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from oxillama_torch.bench.cross_compile import TARGETS, cross_compile, table  # noqa: E402

SOURCE = "oxillama_torch.kernels.sampling.triton_sample:variants"
# Two programs of 256 threads fit a multiprocessor, so that one loads while the other computes.
REGISTERS = 128

pytestmark = pytest.mark.timeout(600)


def test_no_spills_and_room_for_two_programs():
    reports = cross_compile(SOURCE, TARGETS)
    assert len(reports) == 3 * len(TARGETS)
    large = [r for r in reports if r.local_bytes or r.spills or r.registers > REGISTERS]
    assert not large, table(large)
