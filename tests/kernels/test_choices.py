"""The table of choices. Oracle: the registry, asked about each call alone."""

import pytest
import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.choices import choices


@pytest.fixture
def ranged(monkeypatch):
    """An op with a backend for some rows and one for one type."""
    for name in ("_KERNELS", "_MODULES", "_cache"):
        monkeypatch.setattr(registry, name, {})
    monkeypatch.setattr(registry, "_rules", ())
    registry.declare("product")
    registry.register("product", "few", m=(1, 16), priority=2)(lambda: None)
    registry.register("product", "special", types={"Q4_K"}, priority=1)(lambda: None)
    return "product"


def test_the_table_is_what_the_registry_says_of_each_call(ranged):
    table = choices(ranged, "cpu", torch.float32, "fast", ["Q4_K", "Q8_0"])
    assert [(c.types, c.rows, c.backend) for c in table] == [
        (("Q4_K",), "1-16", "few"),
        (("Q4_K",), "17-", "special"),
        (("Q8_0",), "1-16", "few"),
        (("Q8_0",), "17-", None),
    ]
    assert [c.others for c in table] == [("special",), (), (), ()]
    with pytest.raises(UnsupportedError):
        registry.select(ranged, registry.Call("cpu", torch.float32, "fast", "Q8_0", 17))


def test_equal_types_are_one(ranged):
    registry.register(ranged, "rest", m=(17, None))(lambda: None)
    table = choices(ranged, "cpu", torch.float32, "fast", ["F16"])
    assert [(c.types, c.rows, c.backend) for c in table] == [
        ((), "1-16", "few"),
        ((), "17-", "rest"),
    ]
    registry.register(ranged, "best", priority=9)(lambda: None)
    [best] = choices(ranged, "cpu", torch.float32, "fast", ["Q8_0", "Q6_K"])
    assert (best.types, best.rows, best.backend) == ((), "any", "best")
