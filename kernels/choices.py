"""Which backend serves a range of calls, as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry

__all__ = ["Choice", "choices"]

# Numbers of rows that backends are asked about; the borders between them fall on powers of two.
_ROWS = sorted({m for p in range(12) for m in (2**p, 2**p + 1)})


@dataclass(frozen=True, slots=True)
class Choice:
    """What serves an op for some types and numbers of rows.

    Args:
        types: GGML type names; empty: any.
        rows: such as ``1-16``, ``17-`` or ``any``.
        backend: None: nothing can serve these calls.
        reason: why it was chosen, or why nothing can.
        others: further backends that serve some of these calls when asked for, best first.
    """

    op: str
    types: tuple[str, ...]
    rows: str
    backend: str | None
    reason: str
    others: tuple[str, ...] = ()


def choices(
    op: str, device: str, dtype: torch.dtype, numerics: str, types: Sequence[str]
) -> list[Choice]:
    """The choices for weights of ``types``; those that are equal for several types are one."""
    by_type: dict[tuple, list[str]] = {}
    for type_name in types:
        calls = [registry.Call(device, dtype, numerics, type_name, m) for m in _ROWS]
        ranges = []
        for (backend, reason), group in groupby(calls, key=lambda call: _choice(op, call)):
            served = list(group)
            others = _others(op, served, backend)
            ranges.append((_span([call.m for call in served]), backend, reason, others))
        by_type.setdefault(tuple(ranges), []).append(type_name)
    everything = len(by_type) == 1
    return [
        Choice(op, () if everything else tuple(names), *found)
        for ranges, names in by_type.items()
        for found in ranges
    ]


def _span(rows: list[int]) -> str:
    if rows[-1] == _ROWS[-1]:
        return "any" if rows[0] == 1 else f"{rows[0]}-"
    return str(rows[0]) if rows[0] == rows[-1] else f"{rows[0]}-{rows[-1]}"


def _others(op: str, calls: Sequence[registry.Call], chosen: str | None) -> tuple[str, ...]:
    """Backends other than the chosen one that serve at least one of the calls."""
    found: dict[str, None] = {}
    for call in calls:
        for kernel, refused in registry.candidates(op, call):
            if refused is None and kernel.backend != chosen:
                found[kernel.backend] = None
    return tuple(found)


def _choice(op: str, call: registry.Call) -> tuple[str | None, str]:
    """The backend for one call and why; what refused is told without the number asked about."""
    try:
        kernel, reason = registry.explain(op, call)
    except UnsupportedError as error:
        return None, str(error).replace(f", not {call.m}", "").replace(f", m={call.m})", ")")
    return kernel.backend, reason.replace(f", not {call.m}", "")
