"""Matrix products on a CPU through ATen's packed 4-bit weights: the fastest there is, in bfloat16.

``w = (q - 8) * scale + zero`` with groups of 32, scale and zero in bfloat16. Q4_0, Q4_1 and Q4_K
map onto it: the quants stay as they are, the scales and minima lose bits (relative L2 error of a
product about 0.3 %, activations in bfloat16 included). So it serves ``fast`` numerics only. A row's
bits do not depend on the batch all the same: the tests hold it to that.

Shapes: M rows, K inputs, N outputs (rounded up to 16 inside), G = K / 32 groups.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.registry import register

__all__ = ["TYPES", "kept", "pack", "prepare"]

_GROUP = 32
_ROWS = 16  # ATen packs rows in multiples of this
_ROWS_AT_ONCE = 1024  # packing wants 4 bytes a weight meanwhile

_packed: weakref.WeakKeyDictionary[PackedTensor, tuple[Tensor, Tensor]]
_packed = weakref.WeakKeyDictionary()


def _split_q4_0(planes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    scale = planes["d"].float()
    return _halves(planes["qs"], 16), scale, torch.zeros_like(scale)


def _split_q4_1(planes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    d, m = planes["dm"].float().unflatten(1, (-1, 2)).unbind(-1)
    return _halves(planes["qs"], 16), d, 8 * d + m


def _split_q4_k(planes: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    d, dmin = planes["dm"].float().unflatten(1, (-1, 2, 1)).unbind(2)
    sc, m = planes["scales"].float().unflatten(1, (-1, 2, 8)).unbind(2)
    scale = (d * sc).flatten(1)
    return _halves(planes["qs"], 32), scale, 8 * scale - (dmin * m).flatten(1)


def _halves(qs: Tensor, width: int) -> Tensor:
    """Quants uint8 [N, K]: of each ``width`` bytes first the low nibbles, then the high ones."""
    pairs = qs.unflatten(1, (-1, 1, width))
    return torch.cat([pairs & 15, pairs >> 4], dim=2).flatten(1)


# Planes -> quants [N, K], scale and zero float32 [N, G]; layouts in kernels/formats/.
_SPLIT = {"Q4_0": _split_q4_0, "Q4_1": _split_q4_1, "Q4_K": _split_q4_k}
TYPES = frozenset(_SPLIT)


def prepare(weights: Iterable[PackedTensor]) -> None:
    """Pack weights ahead of their first use; those of other types are passed over.

    The packed form takes 5 bits a weight beside the planes, for as long as the weight lives.
    """
    for weight in weights:
        if weight.type_name in TYPES:
            _prepared(weight)


def _prepared(weight: PackedTensor) -> tuple[Tensor, Tensor]:
    found = _packed.get(weight)
    if found is None:
        found = _packed[weight] = pack(weight)
    return found


def kept(weight: PackedTensor) -> tuple[Tensor, ...]:
    """What is kept of a weight now."""
    return _packed.get(weight, ())


def pack(weight: PackedTensor) -> tuple[Tensor, Tensor]:
    """ATen's packed quants, and scales and zeros bfloat16 [G, N, 2]."""
    (rows, inputs), pieces, scales = weight.shape, [], []
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = weight.rows(start, min(start + _ROWS_AT_ONCE, rows))
        quants, scale, zero = _SPLIT[weight.type_name](part.planes)
        missing = -part.shape[0] % _ROWS
        quants = torch.nn.functional.pad(quants.int(), (0, 0, 0, missing))
        pieces.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(quants, 1))
        pair = torch.stack([scale, zero], dim=-1)
        scales.append(torch.nn.functional.pad(pair, (0, 0, 0, 0, 0, missing)))
    assert inputs % _GROUP == 0, "blocks are multiples of 32 weights"
    return torch.cat(pieces), torch.cat(scales).transpose(0, 1).bfloat16().contiguous()


@register(
    "quant_matmul",
    "cpu",
    types=set(TYPES),
    devices=("cpu",),
    numerics=("fast",),
    priority=20,
    error=1e-2,
)
def quant_matmul(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """Arguments as those of :func:`oxillama_torch.kernels.quant_matmul.op.quant_matmul`."""
    packed, scales = _prepared(weight)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.to(torch.bfloat16).contiguous(), packed, _GROUP, scales
    )[:, : weight.shape[0]]
    if bias is not None:
        return (y.float() + bias.float()).to(x.dtype)
    return y.to(x.dtype)
