"""Lanes of the types that ``lanes`` leaves and that have no codebook: see there.

Shapes: as in ``lanes``; the layouts stand in the types' own files in ``kernels/formats``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oxillama_torch.kernels.formats import iq4_nl
from oxillama_torch.kernels.quant_matmul.lane_format import LaneFormat, floats, nibbles

__all__ = ["LANES"]


def _quants5(qs: Tensor, qh: Tensor) -> list[Tensor]:
    """The two parts of Q5_0 and Q5_1, float32 [N, B, 16] each."""
    bit = torch.arange(16, dtype=torch.int32)
    return [
        (q.int() | (qh >> (bit + 16 * part) & 1) << 4).float() for part, q in enumerate(nibbles(qs))
    ]


def _q5_0(qs: Tensor, qh: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return tuple(((q - 16) * d).unsqueeze(-2) for q in _quants5(qs, qh))


def _q5_1(qs: Tensor, qh: Tensor, dm: Tensor) -> tuple[Tensor, ...]:
    d, m = dm.split(1, dim=-1)
    return tuple((q * d + m).unsqueeze(-2) for q in _quants5(qs, qh))


def _crumbs(qs: Tensor) -> list[Tensor]:
    """The 4 parts of 2 bits of types of 256 weights: uint8 [N, B, 2, 32] each."""
    qs = qs.unflatten(-1, (2, 32))
    return [qs & 3, qs >> 2 & 3, qs >> 4 & 3, qs >> 6]


def _halves(scale: Tensor, part: int) -> Tensor:
    """Scales of 16 weights of a part: [N, B, 16] -> [N, B, 2, 2, 1]."""
    return scale.unflatten(-1, (2, 4, 2))[..., part, :, None]


def _scales_q2_k(qs: Tensor, scales: Tensor, dm: Tensor) -> dict[str, Tensor]:
    d, dmin = dm.float().split(1, dim=-1)
    return {"qs": qs, "scale": d * (scales & 15).float(), "least": dmin * (scales >> 4).float()}


def _q2_k(qs: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, ...]:
    parts = []
    for part, q in enumerate(_crumbs(qs)):
        w = q.float().unflatten(-1, (2, 16)) * _halves(scale, part) - _halves(least, part)
        parts.append(w.flatten(-2))
    return tuple(parts)


def _scales_q3_k(scales: Tensor, d: Tensor, **quants: Tensor) -> dict[str, Tensor]:
    return {**quants, "scale": d.float() * scales.float()}


def _q3_k(qs: Tensor, hmask: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    half = torch.tensor([[0], [4]], dtype=torch.uint8)
    parts = []
    for part, q in enumerate(_crumbs(qs)):
        high = (hmask.unsqueeze(-2) >> (half + part) & 1) << 2
        w = ((q | high).float() - 4).unflatten(-1, (2, 16)) * _halves(scale, part)
        parts.append(w.flatten(-2))
    return tuple(parts)


def _tq2_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return tuple((q.float() - 1) * d.unsqueeze(-1) for q in _crumbs(qs))


def _trits_tq1_0(qs: Tensor, d: Tensor) -> dict[str, Tensor]:
    """The base-3 digits, int8 [N, B, 16, 16]: as 16 parts they would take minutes to compile."""
    first, second, last = (part.int() for part in qs.split((32, 16, 4), dim=-1))
    powers = torch.tensor([[1], [3], [9], [27], [81]], dtype=torch.int32)
    runs = [first.unsqueeze(-2) * powers, second.unsqueeze(-2) * powers]
    runs.append(last.unsqueeze(-2) * powers[:4])
    digits = torch.cat([run.flatten(-2) for run in runs], -1)
    trits = ((digits & 255) * 3 >> 8) - 1
    return {"trits": trits.to(torch.int8).unflatten(-1, (16, 16)), "d": d.float()}


def _tq1_0(trits: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return (trits.float() * d.unsqueeze(-1),)


def _q1_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    bits = qs.int().unsqueeze(-1) >> torch.arange(8, dtype=torch.int32) & 1
    return ((bits * 2 - 1).float() * d.unsqueeze(-1),)


def _q2_0(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    q = qs.int().unsqueeze(-1) >> torch.arange(0, 8, 2, dtype=torch.int32) & 3
    return ((q.float() - 1) * d.unsqueeze(-1),)


_VALUES = torch.tensor(iq4_nl.VALUES, dtype=torch.float32)


def _look_up(q: Tensor) -> Tensor:
    return _VALUES[q.int()]


def _iq4_nl(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return tuple((_look_up(q) * d).unsqueeze(-2) for q in nibbles(qs))


def _scales_iq4_xs(qs: Tensor, scales: Tensor, d: Tensor) -> dict[str, Tensor]:
    return {"qs": qs, "scale": d.float() * scales.float()}


def _iq4_xs(qs: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    qs = qs.unflatten(-1, (8, 16))
    return tuple(_look_up(q) * scale.unsqueeze(-1) for q in nibbles(qs))


def _e2m1(q: Tensor) -> Tensor:
    """VALUES of MXFP4 as float32."""
    m = (q & 7).float()
    m = torch.where(m < 4, m, torch.where(m < 6, 2 * m - 4, 4 * m - 16))
    return torch.where(q > 7, 0 - m, m)


def _scales_mxfp4(qs: Tensor, e: Tensor) -> dict[str, Tensor]:
    e = e.int()
    bits = torch.where(e < 2, 0x00200000 << e, (e - 1) << 23)
    return {"qs": qs, "scale": bits.view(torch.float32)}


def _mxfp4(qs: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return tuple((_e2m1(q) * scale).unsqueeze(-2) for q in nibbles(qs))


def _scales_nvfp4(qs: Tensor, d: Tensor) -> dict[str, Tensor]:
    exponent, mantissa = (d >> 3 & 15).int(), (d & 7).float()
    # Half of 2^(exponent - 7) (1 + mantissa / 8), or of 2^-6 mantissa / 8 for exponent 0.
    power = ((exponent.clamp(min=1) + (127 - 11)) << 23).view(torch.float32)
    scale = torch.where(exponent > 0, mantissa + 8, mantissa) * power
    return {"qs": qs, "scale": torch.where(d == 0x7F, 0.0, scale)}


def _nvfp4(qs: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    qs = qs.unflatten(-1, (4, 8))
    return tuple(_e2m1(q) * scale.unsqueeze(-1) for q in nibbles(qs))


def _first_scale(qs: Tensor, ds: Tensor) -> dict[str, Tensor]:
    return {"qs": qs, "d": ds[..., :1].float()}


def _without_sums(qs: Tensor, bsums: Tensor, d: Tensor) -> dict[str, Tensor]:
    return {"qs": qs, "d": d}


def _q8(qs: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    return ((qs.unflatten(-1, (-1, 32)).float() * d.unsqueeze(-1)),)


LANES = {
    "IQ4_NL": LaneFormat(16, 2, _iq4_nl, floats),
    "IQ4_XS": LaneFormat(16, 2, _iq4_xs, _scales_iq4_xs),
    "MXFP4": LaneFormat(16, 2, _mxfp4, _scales_mxfp4),
    "NVFP4": LaneFormat(8, 2, _nvfp4, _scales_nvfp4),
    "Q1_0": LaneFormat(8, 1, _q1_0, floats),
    "Q2_0": LaneFormat(4, 1, _q2_0, floats),
    "Q2_K": LaneFormat(32, 4, _q2_k, _scales_q2_k),
    "Q3_K": LaneFormat(32, 4, _q3_k, _scales_q3_k),
    "Q5_0": LaneFormat(16, 2, _q5_0, floats),
    "Q5_1": LaneFormat(16, 2, _q5_1, floats),
    "Q8_1": LaneFormat(32, 1, _q8, _first_scale),
    "Q8_K": LaneFormat(32, 1, _q8, _without_sums),
    "TQ1_0": LaneFormat(16, 1, _tq1_0, _trits_tq1_0),
    "TQ2_0": LaneFormat(32, 4, _tq2_0, floats),
}
