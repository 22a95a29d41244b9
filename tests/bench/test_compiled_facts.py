"""Counting and drawing what the kernel table holds. Oracle: the variants, the picture's size."""

from dataclasses import replace

import pytest

from oxillama_torch.bench.compiled_facts import compiled_facts, untimed_rows, with_facts
from oxillama_torch.bench.plot import plot_table
from oxillama_torch.errors import UnsupportedError


def test_counts_belong_to_the_kernels_that_serve():
    """dp4a was written to issue a fraction of what decoding to floats does."""
    rows = untimed_rows(["Q8_0"], [1, 16], (64, 256))
    assert {(row.backend, row.m) for row in rows} == {
        ("triton.invariant", 1), ("triton.invariant", 16), ("triton.gemm", 1), ("triton.gemm", 16),
        ("triton.gemv", 1), ("triton.dp4a", 1),
    }  # fmt: skip
    reports = compiled_facts(rows, 90)
    counted = {(row.backend, row.m): with_facts(row, reports) for row in rows}
    assert all(row.registers and row.spills == 0 for row in counted.values())
    per_weight = {key: row.instructions_per_weight for key, row in counted.items()}
    assert per_weight["triton.dp4a", 1] < 2 < per_weight["triton.gemv", 1]


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    [row, *_] = untimed_rows(["Q8_0"], [4], (64, 256))
    timed = replace(row, microseconds=5.0, share_of_copy=0.5, share_of_matmul=0.1, note="")
    plot_table([timed, replace(timed, m=8), row], "a title", tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    with pytest.raises(UnsupportedError, match=r"a\.xyz"):
        plot_table([timed], "a title", tmp_path / "a.xyz")
    with pytest.raises(UnsupportedError, match="without times"):
        plot_table([row], "a title", tmp_path / "a.png")
