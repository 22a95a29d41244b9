"""Timing of kernels, small and on the CPU. Oracle: arithmetic on what is reported."""

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from oxillama_torch.bench.ceilings import Ceilings, measure_ceilings
from oxillama_torch.bench.kernel_table import kernel_table
from oxillama_torch.bench.timing import TooLong, copies_past_cache, measure
from oxillama_torch.cli.bench import app
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.registry import Call

CEILINGS = Ceilings(1e10, 1e11, "float32")


def test_operands_rotate():
    seen = []
    timing = measure([lambda: seen.append(0), lambda: seen.append(1)], "cpu", seconds=0)
    assert timing.runs == 5
    assert timing.low <= timing.median <= timing.high
    assert all(a != b for a, b in zip(seen, seen[1:]))


@pytest.mark.parametrize("nbytes", [1, 10**6, 10**12])
def test_copies_are_bounded(nbytes):
    assert 2 <= copies_past_cache(nbytes) <= 64


def test_figures_fit_together():
    table = kernel_table(
        ["Q8_0"], [1, 3], (64, 256), CEILINGS,
        device="cpu", dtype=torch.float32, backends=["reference"], seconds=0,
    )  # fmt: skip
    for row, m in zip(list(table), (1, 3), strict=True):
        seconds = row.microseconds / 1e6
        assert (row.backend, row.m, row.n, row.k) == ("reference", m, 64, 256)
        assert row.share_of_matmul == pytest.approx(2 * m * 64 * 256 / seconds / 1e11)
        assert row.share_of_copy == pytest.approx(row.gigabytes_per_s / 10)
        assert 64 * 256 < row.gigabytes_per_s * seconds * 1e9 < 2 * 64 * 256


def test_wrong_backend_is_not_timed(monkeypatch):
    registry.candidates("quant_matmul", Call("cpu", torch.float32))  # load what ships, for good
    monkeypatch.setattr(registry, "_KERNELS", {op: dict(k) for op, k in registry._KERNELS.items()})

    def wrong(x, weight, bias=None):
        return x.new_zeros(len(x), weight.shape[0])

    registry.register("quant_matmul", "wrong")(wrong)
    [row] = kernel_table(
        ["Q8_0"], [1], (64, 256), CEILINGS,
        device="cpu", dtype=torch.float32, backends=["wrong"], seconds=0,
    )  # fmt: skip
    assert row.microseconds is None
    assert "wrong" in row.note


def test_what_takes_too_long_is_named():
    calls = []
    with pytest.raises(TooLong, match="would take"):
        measure([lambda: calls.append(time.sleep(0.02))], "cpu", limit=0.01)
    assert len(calls) == 2  # the first may have compiled
    [row] = kernel_table(
        ["Q8_0"], [1], (64, 256), CEILINGS,
        device="cpu", dtype=torch.float32, backends=["reference"], limit=0,
    )  # fmt: skip
    assert row.microseconds is None
    assert row.note.startswith("not timed: would take")


def test_a_baseline_that_takes_too_long_is_named(monkeypatch):
    def too_long(*_):
        raise TooLong(70)

    monkeypatch.setattr("oxillama_torch.bench.kernel_table._dense", too_long)
    [row] = kernel_table(
        ["Q8_0"], [1], (64, 256), CEILINGS, device="cpu", dtype=torch.float32,
        backends=["reference"], baselines=["reference", "dense"], seconds=0,
    )  # fmt: skip
    assert row.times_reference is not None
    assert (row.times_dense, row.note) == (None, "dense not timed: would take 70 s")


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch, tmp_path):
    registry.candidates("quant_matmul", Call("cpu", torch.float32))  # load what ships, for good
    monkeypatch.setattr(registry, "_KERNELS", {op: dict(k) for op, k in registry._KERNELS.items()})
    reference = registry._backends("quant_matmul")["reference"].function

    def stops(x, weight, bias=None):
        if len(x) == 2 and weight.shape == (64, 256):
            raise KeyboardInterrupt
        return reference(x, weight, bias)

    registry.register("quant_matmul", "stops")(stops)
    out = tmp_path / "out.json"
    asked = ("--types", "q8_0", "--m", "1,2,3", "--shapes", "64x256", "--backends", "stops")
    rest = ("--device", "cpu", "--against", "none", "--seconds", "0", "--json", str(out))
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["kernels", *asked, *rest])
    assert done.exit_code
    assert "Q8_0" in done.output
    [row] = json.loads(out.read_text())["rows"]
    assert row["m"] == 1 and row["microseconds"] > 0


def test_ceilings_are_plausible():
    ceilings = measure_ceilings("cpu")
    assert 1e8 < ceilings.copy < 1e13
    assert 1e9 < ceilings.matmul < 1e15
