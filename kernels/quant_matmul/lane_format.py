"""What a lane format is, and what several of them share; ``lanes`` explains it.

Shapes: N rows, B blocks per row, G steps per row, P parts, L lanes; a field is [N, B, width].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LaneFormat", "floats", "nibbles"]


@dataclass(frozen=True, slots=True)
class LaneFormat:
    """How the rows of one GGML type fall into lanes.

    Args:
        lanes: L.
        decode: (**what ``scale`` returns) -> the P parts, float32 [N, B, G / B, L] each.
        parts: P.
        scale: (**fields) -> what ``decode`` takes: the quants, and scales in float32.
    """

    lanes: int
    parts: int
    decode: Callable[..., tuple[Tensor, ...]]
    scale: Callable[..., dict[str, Tensor]]


def floats(**fields: Tensor) -> dict[str, Tensor]:
    """The fields, with floating ones in float32: the ``scale`` of types with plain scales."""
    return {name: x.float() if x.is_floating_point() else x for name, x in fields.items()}


def nibbles(qs: Tensor) -> tuple[Tensor, Tensor]:
    """[..., bytes] -> low and high nibbles, [..., bytes] each."""
    return qs & 15, qs >> 4
