"""Comparing runs. Oracle: rows made by hand."""

from oxillama_torch.bench.compare import compare


def _row(backend, microseconds, spread=0.05, m=1):
    return {
        "op": "quant_matmul", "label": "", "backend": backend, "type": "Q8_0", "m": m,
        "n": 64, "k": 256, "microseconds": microseconds, "spread": spread,
    }  # fmt: skip


def test_moves_beyond_the_spread_are_told():
    before = [_row("a", 100.0), _row("b", 100.0), _row("c", 100.0), _row("gone", 1.0)]
    after = [_row("a", 105.0), _row("b", 150.0), _row("c", 50.0), _row("new", 1.0, m=2)]
    changes, single = compare(before, after)
    found = {change.name.split()[1]: (change.ratio, change.moved) for change in changes}
    assert found == {"a": (1.05, False), "b": (1.5, True), "c": (0.5, True)}
    assert [name.split()[1] for name in single] == ["gone", "new"]
    assert changes[-1].name == "quant_matmul a Q8_0 M=1 N=64 K=256"


def test_rows_without_a_time_do_not_count():
    changes, single = compare([_row("a", None)], [_row("a", 1.0)])
    assert changes == []
    assert len(single) == 1
