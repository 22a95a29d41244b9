"""Weights as vectors of float32 lanes: what the C++ compiler behind torch.compile reads best.

The K weights of a row are taken in their natural order as [G, P, L]: L *lanes* that are computed
side by side, P *parts* that are decoded from the same bytes by different shifts, and G steps. A
decoder returns its P parts as separate tensors [N, B, G / B, L], each an elementwise function of
the planes, so that decoding fuses with whatever consumes the weights. Stacking the parts along the
second-last dimension gives the values of ``Format.dequantize``, bit for bit.

Shapes: N rows, B blocks per row, G steps per row, P parts, L lanes; a field is [N, B, width].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LANES", "LaneFormat"]


@dataclass(frozen=True, slots=True)
class LaneFormat:
    """How the rows of one GGML type fall into lanes.

    Args:
        lanes: L.
        decode: (**fields) -> the P parts, float32 [N, B, G / B, L] each.
        parts: P.
    """

    lanes: int
    parts: int
    decode: Callable[..., tuple[Tensor, ...]]


def _q8_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return ((qs.float() * d.float()).unsqueeze(-2),)


def _nibbles(qs: Tensor) -> tuple[Tensor, Tensor]:
    """[..., bytes] -> low and high nibbles, [..., steps, L] each."""
    return qs & 15, qs >> 4


def _q4_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return tuple(((q.float() - 8) * d.float()).unsqueeze(-2) for q in _nibbles(qs))


def _q4_1(qs: Tensor, dm: Tensor) -> tuple[Tensor, ...]:
    d, m = dm.float().split(1, dim=-1)
    return tuple((q.float() * d + m).unsqueeze(-2) for q in _nibbles(qs))


def _group_scales(scales: Tensor, dm: Tensor, part: int) -> tuple[Tensor, Tensor]:
    """d * sc and dmin * m of a K type's groups ``part``, ``part + 2``, ...: [N, B, 4, 1] each."""
    factors = dm.float().unsqueeze(-1) * scales.unflatten(-1, (2, 4, 2))[..., part].float()
    return factors[..., 0, :, None], factors[..., 1, :, None]


def _q4_k(qs: Tensor, scales: Tensor, dm: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for part, q in enumerate(_nibbles(qs.unflatten(-1, (4, 32)))):
        scale, least = _group_scales(scales, dm, part)
        parts.append(q.float() * scale - least)
    return tuple(parts)


def _q5_k(qs: Tensor, qh: Tensor, scales: Tensor, dm: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for part, q in enumerate(_nibbles(qs.unflatten(-1, (4, 32)))):
        bit = torch.arange(part, 8, 2, dtype=torch.uint8)[:, None]
        high = (qh.unsqueeze(-2) >> bit & 1) << 4
        scale, least = _group_scales(scales, dm, part)
        parts.append((q | high).float() * scale - least)
    return tuple(parts)


def _q6_k(ql: Tensor, qh: Tensor, scales: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    # ql [N, B, half, byte group, 32], qh [N, B, half, 32]; scales of 16 weights each
    (low, low_), (high, high_) = (q.unflatten(-1, (2, 2, 32)).unbind(-2) for q in _nibbles(ql))
    qh = qh.unflatten(-1, (2, 32))
    quants = (
        low | (qh & 0x03) << 4,
        low_ | (qh & 0x0C) << 2,
        high | (qh & 0x30),
        high_ | (qh & 0xC0) >> 2,
    )
    factors = (d.float() * scales.float()).unflatten(-1, (2, 4, 2))
    parts = []
    for part, q in enumerate(quants):
        w = (q.unflatten(-1, (2, 16)).float() - 32) * factors[..., part, :, None]
        parts.append(w.flatten(-2))
    return tuple(parts)


LANES = {
    "Q4_0": LaneFormat(16, 2, _q4_0),
    "Q4_1": LaneFormat(16, 2, _q4_1),
    "Q4_K": LaneFormat(32, 2, _q4_k),
    "Q5_K": LaneFormat(32, 2, _q5_k),
    "Q6_K": LaneFormat(32, 4, _q6_k),
    "Q8_0": LaneFormat(32, 1, _q8_0),
}
