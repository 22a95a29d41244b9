"""kernels/registry.py: who serves a call, and why. Oracle: the selection order of its docstring."""

from __future__ import annotations

import sys
import textwrap
import threading

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.registry import Call, register, select, use_kernels

CPU = Call("cpu", torch.float32, type="Q4_K", m=4)


@pytest.fixture(autouse=True)
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with one op, ``blend``, served by ``reference`` and ``triton.one/.many``."""
    for name in ("_KERNELS", "_MODULES", "_cache", "_missing"):
        monkeypatch.setattr(registry, name, {})
    monkeypatch.setattr(registry, "_rules", ())
    monkeypatch.setattr(registry, "_declare_shipped", lambda: None)
    register("blend", "reference")(lambda: "reference")
    register("blend", "triton.one", m=(1, 8), priority=5)(lambda: "one")
    register("blend", "triton.many", m=(9, None), types={"Q4_K"}, priority=5)(lambda: "many")


def backend(call: Call) -> str:
    return select("blend", call).backend


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (Call("cpu", torch.float32, type="Q4_K", m=8), "triton.one"),
        (Call("cpu", torch.float32, type="Q4_K", m=9), "triton.many"),
        (Call("cpu", torch.float32, type="Q8_0", m=9), "reference"),
        (Call("cpu", torch.float32, type=None, m=9), "reference"),
    ],
    ids=["m8", "m9", "other-type", "no-type"],
)
def test_highest_priority_that_can_serve(call, expected):
    assert backend(call) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"devices": ("cuda",)}, "runs on cuda, not on cpu"),
        ({"types": {"Q8_0", "F32"}}, "serves F32, Q8_0, not Q4_K"),
        ({"m": (5, 8)}, "serves 5 to 8 rows, not 4"),
        ({"m": (5, None)}, "serves 5 to any number of rows, not 4"),
        ({"numerics": ("fast",)}, "serves fast numerics, not invariant"),
        ({"capability": lambda call: f"dislikes {call.dtype}"}, "dislikes torch.float32"),
    ],
    ids=["device", "type", "m", "m-open", "numerics", "capability"],
)
def test_reasons_to_refuse(options, reason):
    register("blend", "picky", **options)(lambda: None)
    reasons = {k.backend: why for k, why in registry.candidates("blend", CPU)}
    assert reasons["picky"] == reason
    with use_kernels("blend=picky"), pytest.raises(UnsupportedError, match=reason):
        select("blend", CPU)


def test_last_rule_wins_and_is_undone():
    registry.set_rules("blend=triton.one,blend=reference")
    assert backend(CPU) == "reference"
    with use_kernels("blend.q4_k=triton.one"):
        assert backend(CPU) == "triton.one"
        assert backend(Call("cpu", torch.float32, type="Q8_0")) == "reference"
        with use_kernels("blend=reference"):
            assert backend(CPU) == "reference"
    assert backend(CPU) == "reference"
    assert [rule.backend for rule in registry.active_rules()] == ["triton.one", "reference"]


def test_rules_are_undone_after_an_error():
    with pytest.raises(ZeroDivisionError), use_kernels("blend=reference"):
        raise ZeroDivisionError
    assert backend(CPU) == "triton.one"


def test_family_name_takes_its_best_member():
    with use_kernels("blend=triton"):
        assert backend(CPU) == "triton.one"
        assert backend(Call("cpu", torch.float32, type="Q4_K", m=64)) == "triton.many"
        with pytest.raises(UnsupportedError, match=r"blend=triton was asked for.*not Q8_0.*not 64"):
            select("blend", Call("cpu", torch.float32, type="Q8_0", m=64))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("blend", "not of the form"),
        ("blend=", "not of the form"),
        ("mix=reference", "unknown op 'mix'; supported: blend"),
        ("blend=trito", "no backend 'trito'; supported: reference, triton.many, triton.one"),
        ("blend.q4_x=reference", "unknown GGML type 'q4_x'; supported: F32"),
    ],
)
def test_bad_rules_name_what_is_known(spec, message):
    with pytest.raises(UnsupportedError, match=message):
        registry.parse_rules(spec)


def test_a_backend_registered_later_is_seen():
    assert backend(CPU) == "triton.one"
    register("blend", "mine", priority=9)(lambda: "mine")
    assert backend(CPU) == "mine"


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="blend=reference is registered already"):
        register("blend", "reference")(lambda: None)


def test_explain_says_why_better_ones_were_passed_over():
    _, reason = registry.explain("blend", CPU)
    assert reason == (
        "best that can serve this call; triton.many serves 9 to any number of rows, not 4"
    )


def test_no_backend_lists_every_reason():
    register("narrow", "only", devices=("cuda",))(lambda: None)
    with pytest.raises(UnsupportedError, match="no backend of narrow.*only runs on cuda"):
        select("narrow", CPU)


def test_modules_load_on_first_use_and_without_triton(tmp_path, monkeypatch):
    source = """
        from oxillama_torch.kernels.registry import register
        {imports}
        register("lazy", {name!r})(lambda: None)
    """
    for name, imports in [("plain", ""), ("needy", "import triton")]:
        text = textwrap.dedent(source).format(name=name, imports=imports)
        (tmp_path / f"lazy_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "triton", None)
    registry.declare("lazy", "lazy_plain", "lazy_needy")
    assert "lazy_plain" not in sys.modules
    assert select("lazy", CPU).backend == "plain"
    assert registry.missing_modules() == {"lazy_needy": "Triton is not installed"}


def test_a_broken_module_shows_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "lazy_broken.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    registry.declare("broken", "lazy_broken")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        select("broken", CPU)


def test_rules_reach_other_threads():
    seen = []
    with use_kernels("blend=reference"):
        thread = threading.Thread(target=lambda: seen.append(backend(CPU)))
        thread.start()
        thread.join()
    assert seen == ["reference"]
