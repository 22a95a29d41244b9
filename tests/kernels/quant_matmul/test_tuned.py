"""kernels/quant_matmul/tuned.py. Oracle: tables made by hand."""

from __future__ import annotations

import json

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels.quant_matmul import configs, tuned
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import use_kernels

CPU = torch.device("cpu")


def _entry(kernel="gemv", type="Q8_0", n=4096, k=4096, m=1, config=(1, 8, 256, 2, 3)):
    m = None if kernel == "invariant" else m
    return {"kernel": kernel, "type": type, "n": n, "k": k, "m": m, "config": list(config)}


@pytest.fixture
def table(tmp_path):
    """Entries -> a Table, through its file."""

    def make(*entries, **changes):
        path = tmp_path / "table.json"
        facts = {"gpu": "A GPU", "capability": 90, "entries": entries, **changes}
        path.write_text(json.dumps(facts))
        return tuned.read_table(path)

    yield make
    tuned.use_table(None)


def test_the_nearest_shape_is_taken(table):
    found = table(
        _entry(n=1024, config=(1, 4, 128, 1, 2)),
        _entry(n=16384, config=(1, 16, 128, 1, 2)),
        _entry(type="Q4_K", n=4096, config=(1, 8, 128, 1, 2)),
    )
    assert found.nearest("gemv", "Q8_0", 1, 2000, 4096).n == 1024
    assert found.nearest("gemv", "Q8_0", 1, 5000, 4096).n == 16384
    assert found.nearest("gemv", "Q6_K", 1, 4096, 4096) is None
    assert found.nearest("dp4a", "Q8_0", 1, 4096, 4096) is None


def test_the_invariant_kernel_has_one_config_for_every_number_of_rows(table, pack):
    few, many = (16, 64, 64, 4, 3), (128, 64, 64, 8, 3)
    tuned.use_table(
        table(
            _entry("invariant", config=(32, 32, 64, 4, 3)),
            _entry("gemm", m=16, config=few),
            _entry("gemm", m=512, config=many),
        )
    )
    weight, _ = pack("Q8_0", 32, 256)
    assert configs.invariant_config(weight) == configs.Config(32, 32, 64, 4, 3)
    found = [configs.gemm_config(weight, m, torch.bfloat16) for m in (1, 16, 400)]
    assert found == [configs.Config(*few), configs.Config(*few), configs.Config(*many)]


@pytest.mark.interpret
def test_kernels_run_with_what_the_table_says(table, pack, activations, assert_close, monkeypatch):
    from oxillama_torch.kernels.quant_matmul import triton_gemm

    used = []
    launch = triton_gemm.launch
    monkeypatch.setattr(
        triton_gemm, "launch", lambda *args: (used.append(args[3]), launch(*args))[1]
    )
    tuned.use_table(table(_entry("invariant", config=(32, 64, 64, 4, 2))))
    weight, values = pack("Q8_0", 70, 256)
    x = activations(5, 256)
    with use_kernels("quant_matmul=triton.invariant"):
        assert_close(quant_matmul(x, weight), x, values)
    assert used == [configs.Config(32, 64, 64, 4, 2)]


def test_other_tables_have_other_fingerprints(table):
    assert tuned.fingerprint(CPU) == ""
    tuned.use_table(table(_entry()))
    one = tuned.fingerprint(CPU)
    tuned.use_table(table(_entry(config=(1, 4, 256, 2, 3))))
    assert one and tuned.fingerprint(CPU) not in ("", one)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([_entry("mine")], "'mine' is none of dp4a"),
        ([_entry(config=(1, 8, 256, 2))], "a config is block_m"),
        ([_entry(config=(1, 7, 256, 2, 3))], "powers of two"),
        ([_entry(config=(1, 8, 256, 64, 3))], "powers of two"),
        ([_entry("gemm", config=(8, 64, 64, 4, 3))], "sides of at least 16"),
        ([_entry(n=0)], "positive"),
        ([_entry() | {"m": None}], "for it alone"),
        ([{"kernel": "gemv"}], "config"),
        ("x", "indices|string"),
    ],
)
def test_bad_tables_are_refused(entries, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"gpu": "A GPU", "capability": 90, "entries": entries}))
    with pytest.raises(UnsupportedError, match=message):
        tuned.read_table(path)


def test_what_ships_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        tuned.read_table(path)
