"""The shipped ops as the registry sees them, and the commands that show and check them."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from oxillama_torch.cli import bench_kernels
from oxillama_torch.cli.bench import app as bench
from oxillama_torch.cli.kernels import app
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry

OPS = {"attention", "embedding", "gated", "quant_matmul", "quant_matmul_experts", "rms_norm"}


@pytest.fixture(autouse=True)
def rules_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_rules", registry.active_rules())


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, catch_exceptions=False)


def test_every_op_is_found_and_has_a_reference():
    ops = registry.registered_ops()
    assert set(ops) >= OPS
    for op in ops:
        assert registry.parse_rules(f"{op}=reference")


def test_list_names_the_backend_and_the_rule():
    assert "reference" in run("list", "--op", "embedding", "--device", "cpu").output
    rule = "quant_matmul.q4_k=triton.gemv"
    asked = ("--op", "quant_matmul", "--type", "q4_k", "--device", "cpu", "--kernels", rule)
    lines = [line for line in run("list", *asked).output.splitlines() if "│ fast " in line]
    assert "triton.gemv" in lines[0] and "1-2" in lines[0] and "asked for by rule" in lines[0]
    assert "none" in lines[1] and "was asked for, but" in lines[1]


@pytest.mark.interpret
def test_check_passes_on_the_triton_kernels():
    shape = ("--m", "2", "--n", "24", "--k", "64")
    asked = ("--op", "quant_matmul", "--backend", "triton.gemm", "--type", "q8_0")
    done = run("check", *asked, *shape, "--device", "cpu")
    assert done.exit_code == 0
    assert "triton.gemm" in done.output and "ok" in done.output


def test_check_fails_on_a_wrong_backend(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", {op: dict(k) for op, k in registry._KERNELS.items()})
    monkeypatch.setattr(registry, "_cache", {})
    reference = registry._backends("quant_matmul")["reference"].function
    registry.register("quant_matmul", "off")(lambda x, w, bias=None: reference(x, w, bias) * 1.001)
    done = run("check", "--op", "quant_matmul", "--backend", "off", "--type", "q8_0",
               "--device", "cpu", "--k", "64")  # fmt: skip
    assert done.exit_code == 4
    assert "relative L2 above" in done.output


@pytest.mark.parametrize("arguments", [("--op", "blend"), ("--device", "tpu"), ("--type", "q9")])
def test_unknown_names_list_the_known_ones(arguments):
    with pytest.raises(UnsupportedError, match="supported: "):
        run("list", *arguments)


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (("--op", "quant_matmul", "--backend", "none-such"), "reference"),
        (("--captured", "--backend", "none-such"), "reference"),
        (("--op", "embedding", "--type", "q4_k", "--k", "100"), "multiples of 256"),
    ],
)
def test_check_refuses_what_it_cannot_check(arguments, known):
    with pytest.raises(UnsupportedError, match=f"supported: .*{known}"):
        run("check", *arguments, "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (("--backends", "none-such"), "reference"),
        (("--m", "0"), "whole numbers"),
        (("--types", "q4_k", "--shapes", "64x100"), "multiples of 256"),
        (("--plot", "picture.none-such"), "."),
    ],
)
def test_bench_refuses_before_it_measures(arguments, known, monkeypatch):
    monkeypatch.setattr(bench_kernels, "measure_ceilings", lambda device: pytest.fail("measured"))
    with pytest.raises(UnsupportedError, match=f"supported: .*{known}"):
        CliRunner().invoke(bench, ("kernels", *arguments), catch_exceptions=False)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"records": {}}'])
def test_compare_wants_tables_of_kernels(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UnsupportedError, match=r"other\.json.*supported: what bench kernels"):
        CliRunner().invoke(bench, ("compare", str(path), str(path)), catch_exceptions=False)
