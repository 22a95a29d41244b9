"""Low-rank terms of adapters on a CPU: dense products in float32, in tiles of rows.

Every product has the same shape whatever the number of rows is, so a row's bits depend on that row
and its adapter alone; see ``quant_matmul/reference.py``.

Shapes: P rows with an adapter, G of them with one adapter, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from oxillama_torch.kernels.lora.op import ROW_TILE, LowRank, RowGroups
from oxillama_torch.kernels.registry import register

__all__ = ["lora"]


@register("lora", "cpu", devices=("cpu",), priority=1)
def lora(y: Tensor, x: Tensor, groups: RowGroups, first: int, sizes: tuple[int, ...]) -> None:
    """CPU backend of :func:`oxillama_torch.kernels.lora.op.lora`, without the gains."""
    for slot, terms in enumerate(groups.entries(first, len(sizes))):
        if not any(terms):
            continue
        places = slice(groups.starts[slot], groups.starts[slot + 1])
        rows, scales = groups.rows[places], groups.scales[places, None]
        tiles = _tiles(x, rows)
        start = 0
        for entry, size in zip(terms, sizes):
            if entry is not None:
                change = scales * _term(tiles, entry)[: len(rows)]
                _add(y.narrow(1, start, size), rows, change)
            start += size


def _tiles(x: Tensor, rows: Tensor) -> Tensor:
    """Some rows of x, float32 [tiles, ROW_TILE, K]; what is missing in the last tile is zero."""
    count = -(-len(rows) // ROW_TILE)
    tiles = x.new_zeros(count * ROW_TILE, x.shape[1], dtype=torch.float32)
    tiles[: len(rows)] = x.index_select(0, rows)
    return tiles.view(count, ROW_TILE, -1)


def _term(tiles: Tensor, entry: LowRank) -> Tensor:
    """``B (A x)`` of every row of the tiles, float32 [tiles * ROW_TILE, N]."""
    a, b = entry.a.planes["w"].float(), entry.b.planes["w"].float()
    parts = [linear(linear(tile, a), b) for tile in tiles]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _add(y: Tensor, rows: Tensor, change: Tensor) -> None:
    if y.dtype == torch.float32:
        y.index_add_(0, rows, change)
    else:
        y[rows] = (y[rows].float() + change).to(y.dtype)
