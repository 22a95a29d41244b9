"""What a benchmark ran on, and its rows as a table or as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from oxillama_torch import __version__
from oxillama_torch.kernels import registry

__all__ = ["as_table", "machine", "write_json"]


def machine() -> dict[str, Any]:
    """Date, processor, device, threads, versions and the kernel rules in force."""
    described = {
        "date": date.today().isoformat(),
        "processor": f"{os.cpu_count()} x {_processor()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "oxillama_torch": __version__,
        "kernels": ",".join(f"{r.op}={r.backend}" for r in registry.active_rules()) or "default",
    }
    if torch.cuda.is_available():
        described["device"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[list[str]]:
    """Cells of ``rows``, the heading first.

    Args:
        columns: key of a row -> heading.
    """
    return [list(columns.values()), *([_cell(row.get(key)) for key in columns] for row in rows)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.3g}" if isinstance(value, float) and abs(value) < 100 else _whole(value)


def _whole(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def write_json(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``{"machine": ..., "rows": [...]}``."""
    text = json.dumps({"machine": machine(), "rows": list(rows)}, indent=1)
    Path(path).write_text(f"{text}\n", encoding="utf-8")
