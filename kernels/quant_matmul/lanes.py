"""Weights as vectors of float32 lanes: what the C++ compiler behind torch.compile reads best.

The K weights of a row are taken in their natural order as [G, P, L]: L *lanes* that are computed
side by side, P *parts* that are decoded from the same bytes by different shifts, and G steps. A
decoder returns its P parts as separate tensors [N, B, G / B, L], each an elementwise function of
the planes, so that decoding fuses with whatever consumes the weights. Stacking the parts along the
second-last dimension gives the values of ``Format.dequantize``, bit for bit.

Scales are turned to float32 first (``scale``), on tensors a 16th or a 32nd of the weights' size: a
loop with both float16 and bfloat16 in it would not be vectorized.

Shapes: N rows, B blocks per row, G steps per row, P parts, L lanes; a field is [N, B, width].
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.kernels.quant_matmul import lanes_grids, lanes_small
from oxillama_torch.kernels.quant_matmul.lane_format import LaneFormat, floats, nibbles

__all__ = ["LANES"]


def _q8_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return ((qs.float() * d).unsqueeze(-2),)


def _q4_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return tuple(((q.float() - 8) * d).unsqueeze(-2) for q in nibbles(qs))


def _q4_1(qs: Tensor, dm: Tensor) -> tuple[Tensor, ...]:
    d, m = dm.split(1, dim=-1)
    return tuple((q.float() * d + m).unsqueeze(-2) for q in nibbles(qs))


def _scales_k(scales: Tensor, dm: Tensor, **quants: Tensor) -> dict[str, Tensor]:
    """d * sc and dmin * m of the 8 groups of 32: [N, B, 8] each."""
    d, dmin = dm.float().split(1, dim=-1)
    sc, m = scales.float().unflatten(-1, (2, 8)).unbind(-2)
    return {**quants, "scale": d * sc, "least": dmin * m}


def _q4_k(qs: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        q.float() * scale[..., part::2, None] - least[..., part::2, None]
        for part, q in enumerate(nibbles(qs.unflatten(-1, (4, 32))))
    )


def _q5_k(qs: Tensor, qh: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for part, q in enumerate(nibbles(qs.unflatten(-1, (4, 32)))):
        bit = torch.arange(part, 8, 2, dtype=torch.uint8)[:, None]
        high = (qh.unsqueeze(-2) >> bit & 1) << 4
        w = (q | high).float() * scale[..., part::2, None] - least[..., part::2, None]
        parts.append(w)
    return tuple(parts)


def _scales_q6_k(scales: Tensor, d: Tensor, **quants: Tensor) -> dict[str, Tensor]:
    """d * sc of the 16 groups of 16: [N, B, 16]."""
    return {**quants, "scale": d.float() * scales.float()}


def _q6_k(ql: Tensor, qh: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    # ql [N, B, half, byte group, 32], qh [N, B, half, 32]; scales of 16 weights each
    (low, low_), (high, high_) = (q.unflatten(-1, (2, 2, 32)).unbind(-2) for q in nibbles(ql))
    qh = qh.unflatten(-1, (2, 32))
    quants = (
        low | (qh & 0x03) << 4,
        low_ | (qh & 0x0C) << 2,
        high | (qh & 0x30),
        high_ | (qh & 0xC0) >> 2,
    )
    factors = scale.unflatten(-1, (2, 4, 2))
    parts = []
    for part, q in enumerate(quants):
        w = (q.unflatten(-1, (2, 16)).float() - 32) * factors[..., part, :, None]
        parts.append(w.flatten(-2))
    return tuple(parts)


LANES = {
    "Q4_0": LaneFormat(16, 2, _q4_0, floats),
    "Q4_1": LaneFormat(16, 2, _q4_1, floats),
    "Q4_K": LaneFormat(32, 2, _q4_k, _scales_k),
    "Q5_K": LaneFormat(32, 2, _q5_k, _scales_k),
    "Q6_K": LaneFormat(32, 4, _q6_k, _scales_q6_k),
    "Q8_0": LaneFormat(32, 1, _q8_0, floats),
    **lanes_small.LANES,
    **lanes_grids.LANES,
}
