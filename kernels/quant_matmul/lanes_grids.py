"""Lanes of the types with codebooks: see ``lanes``. A step is one entry of a codebook.

The rows of the codebook are read whole, so a step has as many lanes as an entry has values.

Shapes: as in ``lanes``; the layouts stand in the types' own files in ``kernels/formats``. E entries
of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from oxillama_torch.kernels.formats import grids
from oxillama_torch.kernels.formats.iq1_m import block_scale
from oxillama_torch.kernels.formats.iq1_s import DELTA
from oxillama_torch.kernels.quant_matmul.lane_format import LaneFormat

__all__ = ["LANES"]

_CPU = torch.device("cpu")


def _signed(grid: grids.Grid) -> Callable[..., tuple[Tensor, ...]]:
    """The decoder of a type with signed entries of ``grid``."""
    table = grid.entries(_CPU)

    def decode(index: Tensor, signs: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """index, signs int32, scale float32 [N, B, E] each; bit j of signs is of lane j."""
        negative = signs.unsqueeze(-1) >> torch.arange(grid.width, dtype=torch.int32) & 1
        values = table[index] * scale.unsqueeze(-1)
        return (torch.where(negative != 0, -values, values),)

    return decode


def _ternary(index: Tensor, delta: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """index int32, delta and scale float32 [N, B, E] each."""
    return ((_TERNARY[index] + delta.unsqueeze(-1)) * scale.unsqueeze(-1),)


_TERNARY = grids.IQ1_S.entries(_CPU)


def _fields(word: Tensor, step: int, count: int) -> Tensor:
    """int32 [..., n] -> [..., count n]: the word shifted by 0, ``step``, 2 ``step``, ..."""
    return (word.unsqueeze(-1) >> torch.arange(0, step * count, step, dtype=torch.int32)).flatten(
        -2
    )


def _even(seven: Tensor) -> Tensor:
    """The eighth sign from seven."""
    parity = 0x6996 >> ((seven ^ seven >> 4) & 15) & 1
    return seven | parity << 7


def _nibble_pairs(packed: Tensor) -> Tensor:
    return _fields(packed.int(), 4, 2) & 15


def _repeat(scale: Tensor, entries: int) -> Tensor:
    """Scales [N, B, n], each for so many entries that there are ``entries``."""
    return scale.repeat_interleave(entries // scale.shape[-1], -1)


def _iq2_xxs(qs: Tensor, signs: Tensor, d: Tensor) -> dict[str, Tensor]:
    scale = d.float() * ((signs >> 28 & 15).float() + 0.5) * 0.25
    signs = _even(_fields(signs, 7, 4) & 127)
    return {"index": qs.int(), "signs": signs, "scale": _repeat(scale, 32)}


def _iq2_xs(qs: Tensor, scales: Tensor, d: Tensor) -> dict[str, Tensor]:
    scale = d.float() * (_nibble_pairs(scales).float() + 0.5) * 0.25
    qs = qs.int()
    return {"index": qs & 511, "signs": _even(qs >> 9 & 127), "scale": _repeat(scale, 32)}


def _iq2_s(qs: Tensor, high: Tensor, d: Tensor) -> dict[str, Tensor]:
    low, signs = qs.int().split(32, dim=-1)
    qh, scales = high.split(8, dim=-1)
    scale = d.float() * (_nibble_pairs(scales).float() + 0.5) * 0.25
    index = low | (_fields(qh.int(), 2, 4) & 3) << 8
    return {"index": index, "signs": signs, "scale": _repeat(scale, 32)}


def _iq3_xxs(qs: Tensor, signs: Tensor, d: Tensor) -> dict[str, Tensor]:
    scale = d.float() * ((signs >> 28 & 15).float() + 0.5) * 0.5
    signs = _fields(_even(_fields(signs, 7, 4) & 127), 4, 2)
    return {"index": qs.int(), "signs": signs, "scale": _repeat(scale, 64)}


def _iq3_s(qs: Tensor, high: Tensor, d: Tensor) -> dict[str, Tensor]:
    qh, signs, scales = high.int().split((8, 32, 4), dim=-1)
    scale = d.float() * (2 * _nibble_pairs(scales) + 1).float()
    index = qs.int() | (_fields(qh, 1, 8) & 1) << 8
    return {"index": index, "signs": _fields(signs, 4, 2), "scale": _repeat(scale, 64)}


def _iq1_s(qs: Tensor, qh: Tensor, d: Tensor) -> dict[str, Tensor]:
    qh = qh.int()
    delta = torch.where(qh < 0, -DELTA, DELTA)
    scale = d.float() * (2 * (qh >> 12 & 7) + 1).float()
    index = qs.int() | (_fields(qh, 3, 4) & 7) << 8
    return {"index": index, "delta": _repeat(delta, 32), "scale": _repeat(scale, 32)}


def _iq1_m(qs: Tensor, qh: Tensor, scales: Tensor) -> dict[str, Tensor]:
    qh = _nibble_pairs(qh)
    scale = block_scale(scales) * (2 * (_fields(scales.int(), 3, 4) & 7) + 1).float()
    index = qs.int() | (qh & 7) << 8
    return {
        "index": index,
        "delta": torch.where(qh > 7, -DELTA, DELTA),
        "scale": _repeat(scale, 32),
    }


LANES = {
    "IQ1_S": LaneFormat(8, 1, _ternary, _iq1_s),
    "IQ1_M": LaneFormat(8, 1, _ternary, _iq1_m),
    "IQ2_XXS": LaneFormat(8, 1, _signed(grids.IQ2_XXS), _iq2_xxs),
    "IQ2_XS": LaneFormat(8, 1, _signed(grids.IQ2_XS), _iq2_xs),
    "IQ2_S": LaneFormat(8, 1, _signed(grids.IQ2_S), _iq2_s),
    "IQ3_XXS": LaneFormat(4, 1, _signed(grids.IQ3_XXS), _iq3_xxs),
    "IQ3_S": LaneFormat(4, 1, _signed(grids.IQ3_S), _iq3_s),
}
