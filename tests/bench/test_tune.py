"""Tuning, interpreted and small. Oracle: timings put in, the table's own reader."""

import json
from types import SimpleNamespace

import pytest

from oxillama_torch.bench import tune as module
from oxillama_torch.bench.kernel_table import parse_shapes
from oxillama_torch.bench.tune import as_table, jobs, tune
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.quant_matmul import configs, tuned


def test_jobs_name_what_serves():
    found = jobs(["Q8_0", "IQ3_S"], [1, 4, 64], [(64, 256)])
    rows = {(j.kernel, j.type): [i.m for i in found if (i.kernel, i.type) == (j.kernel, j.type)]
            for j in found}  # fmt: skip
    assert rows["dp4a", "Q8_0"] == [1, 4]
    assert ("dp4a", "IQ3_S") not in rows
    assert rows["gemv", "IQ3_S"] == [1]
    assert rows["gemm", "IQ3_S"] == [1, 4, 64]
    assert rows["invariant", "IQ3_S"] == [1]


@pytest.mark.interpret
def test_the_fastest_right_config_wins(monkeypatch, tmp_path):
    """The second candidate is fastest; the third would be, but computes something else."""
    todo = [configs.Config(16, bn, 64, 4) for bn in (64, 32, 128)]
    monkeypatch.setattr(configs, "candidates", lambda kernel, format, rows: todo)
    launcher = module._launcher

    def spoilt(kernel):
        launch = launcher(kernel)
        return lambda x, w, bias, config: launch(x, w, bias, config) + (config.block_n == 128)

    times = {64: 3e-6, 32: 2e-6, 128: 1e-6}
    asked = []
    monkeypatch.setattr(module, "_launcher", spoilt)
    monkeypatch.setattr(module, "measure", lambda calls, device, seconds: (
        SimpleNamespace(median=times[asked.pop(0)])
    ))  # fmt: skip
    asked += [64, 32]
    monkeypatch.setattr(module, "_CHECK_SHAPE", (64, 256))
    [found] = tune([module.Job("gemm", "Q8_0", 64, 256, 4)], "cpu")
    assert (found.config, found.microseconds) == (todo[1], pytest.approx(2.0))
    assert (found.default_microseconds, found.tried, found.refused) == (pytest.approx(3.0), 2, 1)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(as_table([found], "cpu")))
    [entry] = tuned.read_table(path).entries
    assert (entry.kernel, entry.config) == ("gemm", (16, 32, 64, 4, 3))


def test_the_default_is_tried_first_and_every_candidate_fits_a_table():
    from oxillama_torch.kernels import formats

    for kernel in tuned.KERNELS:
        found = configs.candidates(kernel, formats.get("Q8_0"), 64)
        assert found[0] == configs.default(kernel, formats.get("Q8_0"), 64)
        assert len(set(found)) == len(found) > 20


def test_shapes():
    assert parse_shapes("llama-8b-up,8x32") == [(14336, 4096), (8, 32)]
    assert len(parse_shapes("llama-8b")) == 3
    with pytest.raises(UnsupportedError, match="llama-9b"):
        parse_shapes("llama-9b")
