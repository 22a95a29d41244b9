"""The findings of ``scripts/gpu_check`` as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["as_markdown"]


def as_markdown(result: Mapping[str, Any]) -> str:
    """Machine, then one part per section; a section that failed says why."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    parts = [f"# GPU check\n\n{machine}"]
    writers = {"ceilings": _ceilings, "kernels": _kernels, "host": _end_to_end}
    writers |= {"demo": _end_to_end, "8b": _end_to_end, "graphs": _end_to_end}
    for name, found in result["sections"].items():
        for state in ("failed", "skipped", "summary"):
            if state in found:
                text = f"{state}: {found[state]}" if state != "summary" else found[state]
                break
        else:
            text = writers[name](found)
        parts.append(f"## {name}\n\n{text}")
    return "\n\n".join(parts)


def _ceilings(found: Mapping[str, Any]) -> str:
    return (
        f"copy {found['copy'] / 1e9:,.0f} GB/s, "
        f"{found['matmul_dtype']} matmul {found['matmul'] / 1e12:,.1f} TFLOP/s"
    )


def _kernels(found: Mapping[str, Any]) -> str:
    head = ("type", "M", "backend", "chosen", "µs", "GB/s", "of copy", "of matmul", "rel. L2")
    return _table(head, (_kernel_cells(row) for row in found["rows"]))


def _kernel_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    cells = (row["type"], str(row["m"]), row["backend"], "yes" if row["chosen"] else "")
    if row["microseconds"] is None:
        return (*cells, row["note"], "", "", "", "")
    error = "" if row["relative_l2"] is None else f"{row['relative_l2']:.1e}"
    return (
        *cells,
        f"{row['microseconds']:,.1f}",
        f"{row['gigabytes_per_s']:,.0f}",
        f"{row['share_of_copy']:.2f}",
        f"{row['share_of_matmul']:.2f}",
        error,
    )


def _end_to_end(found: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in found["rows"] for name in row))
    return _table(names, ([_cell(row.get(name, "")) for name in names] for row in found["rows"]))


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
