"""Checking backends on random operands and a model's own. Oracle: faults put in on purpose."""

from dataclasses import replace

import pytest
import torch

from oxillama_torch.bench.capture import capture
from oxillama_torch.bench.cases import PACKED_OPS, WRITTEN, cases_of, known_ops
from oxillama_torch.bench.kernel_check import check_case
from oxillama_torch.config import EngineConfig
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.registry import Call


def _call(op, m=3):
    return Call("cpu", torch.float32, type="Q8_0" if op in PACKED_OPS else None, m=m)


def _reference(case):
    [kernel] = [k for k, _ in registry.candidates(case.op, case.call) if k.backend == "reference"]
    return kernel


def test_every_op_has_cases():
    assert set(known_ops()) == set(registry.registered_ops())


@pytest.mark.parametrize("op", known_ops())
@pytest.mark.parametrize("m", [1, 3])
def test_a_case_runs_twice_alike_and_changes_nothing(op, m):
    for case in cases_of(op, _call(op, m), (96, 256)):
        before = [x.clone() for x in case.args if isinstance(x, torch.Tensor)]
        first, second = case.run(_reference(case)), case.run(_reference(case))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(x.isfinite().all() for x in first)
        assert any(x.any() for x in first)
        after = [x for x in case.args if isinstance(x, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("op", known_ops())
def test_a_small_fault_is_seen(op):
    """One element of each result off by a hundredth of its norm, then one NaN."""
    for case in cases_of(op, _call(op), (96, 256)):
        reference = _reference(case)
        for value in (None, float("nan")):
            check = check_case(replace(reference, function=_spoilt(reference, case, value)), case)
            assert not check.passed
            assert check.nans == (value is not None)
        assert check_case(reference, case).passed


def _spoilt(reference, case, value):
    """The reference with one element of what it returns (or, where it returns nothing, writes)."""

    def run(*args, **kwargs):
        out = reference.function(*args, **kwargs)
        tensors = [out] if isinstance(out, torch.Tensor) else list(out or ())
        tensors = [x for x in tensors if x.is_floating_point()]
        target = (tensors or [args[WRITTEN[case.op][0]]])[0].view(-1)
        target[-1] = target[-1] + 0.01 * (1 + target.norm()) if value is None else value
        return out

    return run


def test_a_write_outside_of_its_slots_is_seen():
    case = cases_of("rope_store_kv", _call("rope_store_kv"), (96, 256))[0]
    reference = _reference(case)

    def run(*args, **kwargs):
        args[8].view(-1)[-1] += 1
        return reference.function(*args, **kwargs)

    assert not check_case(replace(reference, function=run), case).passed


def test_the_error_that_a_backend_states_is_allowed():
    [case] = cases_of("quant_matmul", _call("quant_matmul"), (96, 256))
    reference = _reference(case)
    rough = replace(reference, function=lambda *args: reference.function(*args) * 1.01)
    assert not check_case(rough, case).passed
    assert check_case(replace(rough, error=0.02), case).passed


def test_capture_keeps_what_a_model_calls():
    """Prefill and decode of the demo model: every op it uses, as often as weights differ."""
    cases = capture(EngineConfig(device="cpu"), "import os\n")
    assert {case.op for case in cases} == {
        *("attention", "embedding", "gated", "quant_matmul", "quant_matmul_gated", "rms_norm"),
        "rope_store_kv",
    }
    rows = {case.call.m for case in cases if case.op == "quant_matmul"}
    assert 1 in rows and max(rows) > 1
    shapes = {case.label for case in cases if case.op == "quant_matmul"}
    assert len(shapes) >= 4
    for case in cases:
        assert check_case(_reference(case), case).passed
