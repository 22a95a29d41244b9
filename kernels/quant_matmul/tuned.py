"""Tuned tile sizes: one JSON table per GPU, made by ``oxillama kernels tune``.

A table lies in ``tables/`` beside this file, or is loaded with ``use_table``. The one for the GPU
at hand is taken by its name, else one of the same generation; where there is none, or it knows
nothing of a kernel and type, the defaults of ``configs`` serve. Of a table's entries the nearest
shape is taken (distance of the logarithms), so any shape is served.

A pure function of table and shape: nothing is tuned while serving. A row's bits depend on its
config, so the table is part of a model's fingerprint; entries of the ``invariant`` kernel hold for
every number of rows.

    {"gpu": "NVIDIA H200", "capability": 90, "torch": "...", "triton": "...", "entries": [
      {"kernel": "gemv", "type": "Q4_K", "n": 14336, "k": 4096, "m": 1,
       "config": [1, 8, 256, 2, 3], "microseconds": ..., "default_microseconds": ...}]}

Shapes: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oxillama_torch.errors import UnsupportedError

__all__ = ["FOLDER", "KERNELS", "Table", "fingerprint", "lookup", "read_table", "use_table"]

FOLDER = Path(__file__).parent / "tables"
KERNELS = ("dp4a", "gemm", "gemv", "invariant")
_FIELDS = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
_MOST_WARPS, _MOST_STAGES = 16, 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One config; ``m`` is None for the invariant kernel."""

    kernel: str
    type: str
    n: int
    k: int
    m: int | None
    config: tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Table:
    """Configs of one GPU.

    Args:
        gpu: its name.
        capability: such as 90.
        entries: in any order.
        digest: of the file's bytes.
    """

    gpu: str
    capability: int
    entries: tuple[Entry, ...]
    digest: str

    def nearest(self, kernel: str, type_name: str, m: int, n: int, k: int) -> Entry | None:
        """The entry of a kernel and type whose shape is nearest; None when there is none."""
        mine = [e for e in self.entries if (e.kernel, e.type) == (kernel, type_name)]

        def distance(entry: Entry) -> tuple[float, int, int, int]:
            pairs = [(entry.n, n), (entry.k, k)] + ([(entry.m, m)] if entry.m else [])
            far = sum(abs(math.log2(a / b)) for a, b in pairs)
            return far, entry.n, entry.k, entry.m or 0

        return min(mine, key=distance, default=None)


def read_table(path: Path) -> Table:
    """Read and check a table.

    Raises:
        UnsupportedError: not a table, or one with a config that no kernel could run with.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        raw = json.loads(data)
        entries = tuple(_entry(item) for item in raw["entries"])
        found = Table(str(raw["gpu"]), int(raw["capability"]), entries, _digest(data))
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(f"{path} as a table of tuned kernels: {error}") from error
    return found


def _entry(item: dict[str, Any]) -> Entry:
    kernel, config = item["kernel"], tuple(item["config"])
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is none of {', '.join(KERNELS)}")
    if (item["m"] is None) != (kernel == "invariant"):
        raise ValueError(f"{kernel}: m must be null for the invariant kernel, and for it alone")
    sizes = (item["n"], item["k"], item["m"] or 1)
    if not all(isinstance(x, int) and x > 0 for x in sizes):
        raise ValueError(f"{kernel}: n, k and m must be positive integers, got {sizes}")
    if len(config) != len(_FIELDS) or not all(isinstance(x, int) and x > 0 for x in config):
        raise ValueError(f"{kernel}: a config is {', '.join(_FIELDS)}, got {config}")
    *tiles, warps, stages = config
    if any(x & (x - 1) for x in (*tiles, warps)) or warps > _MOST_WARPS or stages > _MOST_STAGES:
        raise ValueError(f"{kernel}: tiles and warps must be powers of two, got {config}")
    if kernel in ("gemm", "invariant") and min(tiles) < 16:
        raise ValueError(f"{kernel}: a tensor core's tile has sides of at least 16, got {config}")
    return Entry(kernel, item["type"], item["n"], item["k"], item["m"], config)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


_chosen: Table | None = None


def use_table(table: Table | None) -> None:
    """Take every config from this table, whatever the GPU; None: from those that ship."""
    global _chosen
    _chosen = table
    lookup.cache_clear()


@functools.lru_cache(maxsize=4096)
def lookup(
    kernel: str, device: torch.device, type_name: str, m: int, n: int, k: int
) -> tuple[int, int, int, int, int] | None:
    """(block_m, block_n, block_k, num_warps, num_stages), or None where no table has an answer."""
    table = _table(device)
    entry = table.nearest(kernel, type_name, m, n, k) if table is not None else None
    return entry.config if entry is not None else None


def fingerprint(device: torch.device) -> str:
    """Names the table in force on a device; "" for none."""
    table = _table(device)
    return table.digest if table is not None else ""


def _table(device: torch.device) -> Table | None:
    if _chosen is not None:
        return _chosen
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return _shipped(torch.cuda.get_device_name(device), 10 * major + minor)


@functools.cache
def _shipped(gpu: str, capability: int) -> Table | None:
    """The table of a GPU of this name, else the first by name of one of its generation."""
    tables = [read_table(path) for path in sorted(FOLDER.glob("*.json"))]
    same = [table for table in tables if table.gpu == gpu]
    alike = [table for table in tables if table.capability // 10 == capability // 10]
    return next(iter(same + alike), None)
