"""Two runs of the kernel table side by side: what moved beyond the spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Change", "compare"]

_KEY = ("op", "label", "backend", "type", "m", "n", "k")


@dataclass(frozen=True, slots=True)
class Change:
    """One kernel in both runs.

    Args:
        name: op, case, backend, type and shape.
        before, after: median microseconds.
        ratio: after over before.
        moved: whether the medians differ by more than both quartile ranges together.
    """

    name: str
    before: float
    after: float
    ratio: float
    moved: bool


def compare(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> tuple[list[Change], list[str]]:
    """Match rows of two kernel tables.

    Returns:
        (changes, largest first; names of what only one of the runs has timed).
    """
    old, new = _timed(before), _timed(after)
    changes = []
    for key in old.keys() & new.keys():
        a, b = old[key]["microseconds"], new[key]["microseconds"]
        spread = a * old[key]["spread"] + b * new[key]["spread"]
        changes.append(Change(_name(key), a, b, b / a, abs(b - a) > spread))
    changes.sort(key=lambda change: (-abs(change.ratio - 1), change.name))
    return changes, sorted(map(_name, old.keys() ^ new.keys()))


def _name(key: tuple) -> str:
    return "{} {} {} {} M={} N={} K={}".format(*key).replace("  ", " ")


def _timed(rows: Sequence[Mapping[str, Any]]) -> dict[tuple, Mapping[str, Any]]:
    return {tuple(row[name] for name in _KEY): row for row in rows if row["microseconds"]}
