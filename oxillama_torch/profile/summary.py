"""Records added up: by op and kernel, and by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from oxillama_torch.bench.ceilings import Ceilings
from oxillama_torch.profile.recorder import Record

__all__ = ["Line", "by_kernel", "by_layer", "roofline_seconds"]

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Line:
    """Some records together.

    Args:
        share: of the time of all records.
        roofline: time that the ceilings allow, over the time taken: 1 is as fast as can be.
    """

    name: str
    calls: int
    seconds: float
    share: float
    nbytes: int
    flops: int
    roofline: float


def roofline_seconds(nbytes: int, flops: int, ceilings: Ceilings) -> float:
    """Least time for so many bytes and operations: the slower of the two decides."""
    return max(nbytes / ceilings.copy, flops / ceilings.matmul)


def by_kernel(records: Iterable[Record], ceilings: Ceilings) -> list[Line]:
    """One line per op, GGML type and backend, longest first."""

    def name(record: Record) -> str:
        return " ".join(filter(None, (record.op, record.type, f"[{record.backend}]")))

    return sorted(_lines(records, ceilings, name), key=lambda line: -line.seconds)


def by_layer(records: Iterable[Record], ceilings: Ceilings) -> list[Line]:
    """One line per decoder layer in order, then one per part outside the layers."""

    def name(record: Record) -> str:
        match = _LAYER.match(record.module)
        return f"layer {int(match[1]):3d}" if match else record.module.partition(".")[0] or "other"

    return sorted(_lines(records, ceilings, name), key=lambda line: line.name)


def _lines(
    records: Iterable[Record], ceilings: Ceilings, name: Callable[[Record], str]
) -> list[Line]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(name(record), []).append(record)
    total = sum(record.seconds for group in groups.values() for record in group) or 1.0
    lines = []
    for key, group in groups.items():
        seconds = sum(record.seconds for record in group)
        least = sum(roofline_seconds(r.nbytes, r.flops, ceilings) for r in group)
        lines.append(
            Line(
                name=key,
                calls=len(group),
                seconds=seconds,
                share=seconds / total,
                nbytes=sum(record.nbytes for record in group),
                flops=sum(record.flops for record in group),
                roofline=least / seconds if seconds else 0.0,
            )
        )
    return lines
