"""Weights of slow types as bytes, for the compiled products of a CPU.

Where a weight is put together from bits of several bytes, taking it apart again costs more than
everything else: 3 to 5 times the product with whole bytes (Q6_K, one row, 2 vCPU). So a model's
weights of these types are kept once more as

    w = scale * q - least       q int8; scale, least float32 per 16 or 32 weights

with the same bits as ``Format.dequantize``. That is 9 to 12 bits a weight beside the planes, for as
long as the weight lives.

Shapes: N rows, B blocks per row, P parts, L lanes: see ``lanes``.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.lane_format import LaneFormat, floats
from oxillama_torch.kernels.quant_matmul.lanes import LANES

__all__ = ["FORMS", "TYPES", "fields_of", "kept", "name_of", "split", "unpack"]

#: Types that are unpacked: all with an own scale for every 16 or 32 of their 256 weights.
TYPES = frozenset({"IQ4_XS", "Q2_K", "Q3_K", "Q5_K", "Q6_K"})

_LANES = 32
_ROWS_AT_ONCE = 1024  # unpacking wants 8 bytes a weight meanwhile

_unpacked: weakref.WeakKeyDictionary[PackedTensor, dict[str, Tensor]]
_unpacked = weakref.WeakKeyDictionary()


def _decode(q: Tensor, scale: Tensor, least: Tensor | None = None) -> tuple[Tensor, ...]:
    run = q.shape[-1] // scale.shape[-1]
    w = q.float() * scale.repeat_interleave(run, -1)
    if least is not None:
        w = w - least.repeat_interleave(run, -1)
    return (w.unflatten(-1, (-1, _LANES)),)


#: By ``name_of``: the types as they are packed, and the unpacked ones.
FORMS = {**LANES, **{f"{name}_bytes": LaneFormat(_LANES, 1, _decode, floats) for name in TYPES}}


def unpack(weight: PackedTensor) -> None:
    """Keep a weight as bytes too, if it is of one of TYPES."""
    if weight.type_name in TYPES and weight not in _unpacked:
        starts = range(0, weight.shape[0], _ROWS_AT_ONCE)
        parts = [
            split(weight.rows(start, min(start + _ROWS_AT_ONCE, weight.shape[0])))
            for start in starts
        ]
        _unpacked[weight] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def kept(weight: PackedTensor) -> tuple[Tensor, ...]:
    """What is kept of a weight now."""
    return tuple(_unpacked.get(weight, {}).values())


def name_of(weight: PackedTensor) -> str:
    """Which of FORMS the fields of a weight are read by."""
    return f"{weight.type_name}_bytes" if weight in _unpacked else weight.type_name


def fields_of(weight: PackedTensor) -> dict[str, Tensor]:
    """The weight's planes by blocks, or its bytes: [N, B, width] each."""
    if weight in _unpacked:
        return _unpacked[weight]
    widths = weight.format.fields
    return {name: x.unflatten(1, (-1, widths[name])) for name, x in weight.planes.items()}


def split(weight: PackedTensor) -> dict[str, Tensor]:
    """Quants and scales of a weight with ``w = scale * q - least``.

    Decoding with all scales 1 and minima 0 gives the quants.

    Returns: q int8 [N, B, block], scale float32 [N, B, groups], and least where there are any.
    """
    form = LANES[weight.type_name]
    scaled = form.scale(**fields_of(weight))
    factors, neutral = {}, {}
    for name, value in scaled.items():
        if name in ("scale", "d"):
            factors["scale"], neutral[name] = value, torch.ones_like(value)
        elif name == "least":
            factors["least"], neutral[name] = value, torch.zeros_like(value)
        elif name == "dm":
            d, m = value.split(1, dim=-1)
            factors |= {"scale": d, "least": -m}
            neutral[name] = torch.cat([torch.ones_like(d), torch.zeros_like(m)], -1)
    q = torch.stack(form.decode(**scaled | neutral), -2).flatten(2)
    q8 = q.to(torch.int8)
    assert torch.equal(q, q8.float()), f"{weight.type_name} has quants beyond a byte"
    return {"q": q8, **factors}
