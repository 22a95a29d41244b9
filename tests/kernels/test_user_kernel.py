"""The worked example of docs/own-kernel.md. Oracle: the reference."""

from pathlib import Path

import pytest
import torch

from oxillama_torch.bench.cases import cases_of, random_weight
from oxillama_torch.bench.kernel_check import check_case
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.quant_matmul.op import quant_matmul
from oxillama_torch.kernels.registry import Call, load_file, use_kernels

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "my_kernel.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def registered(monkeypatch):
    """The example, registered for one test."""
    registry.candidates("quant_matmul", Call(DEVICE, torch.float32))  # load what ships, for good
    monkeypatch.setattr(registry, "_KERNELS", {op: dict(k) for op, k in registry._KERNELS.items()})
    monkeypatch.setattr(registry, "_cache", {})
    for name in [n for n in registry.sys.modules if n.startswith("oxillama_user_kernels_")]:
        monkeypatch.delitem(registry.sys.modules, name)
    load_file(EXAMPLE)


@pytest.mark.interpret
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K"])
def test_example_computes_what_the_reference_does(registered, type_name):
    call = Call(DEVICE, torch.float32, type=type_name, m=3)
    [mine] = [k for k, _ in registry.candidates("quant_matmul", call) if k.backend == "mine"]
    [case] = cases_of("quant_matmul", call, (70, 512))
    assert check_case(mine, case).passed


@pytest.mark.interpret
def test_it_runs_when_asked_for_and_only_then(registered):
    call = Call(DEVICE, torch.float32, type="Q8_0")
    assert registry.select("quant_matmul", call).backend != "mine"
    with use_kernels("quant_matmul=mine"):
        assert registry.select("quant_matmul", call).backend == "mine"
        x, weight = torch.randn(2, 256, device=DEVICE), random_weight("Q8_0", 8, 256).to(DEVICE)
        torch.testing.assert_close(quant_matmul(x, weight), x @ weight.dequantize().T)
        with pytest.raises(UnsupportedError, match="mine.*serves Q4_K, Q8_0, not Q6_K"):
            quant_matmul(x, random_weight("Q6_K", 8, 256).to(DEVICE))


def test_a_failing_file_raises_what_it_raised(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("raise ZeroDivisionError('mine')")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="mine"):
            load_file(path)
    with pytest.raises(UnsupportedError, match="kernel file"):
        load_file(tmp_path / "absent.py")
