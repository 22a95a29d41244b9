"""Launcher of the low-rank terms that adapters add to a linear layer: checks, choice, call.

Shapes: M rows of a step, P of them with an adapter, S adapters, K inputs, N outputs, R rank
(padded to RANK_TILE), T tiles of rows, E linear layers of the model (parts of fused ones count).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.lora.lines import LineGroups

__all__ = [
    "MAX_PARTS",
    "RANK_TILE",
    "ROW_TILE",
    "FactorTable",
    "LowRank",
    "RowGroups",
    "lora",
    "padded_rank",
]

RANK_TILE = 16  # the smallest side of a tensor core's tile
ROW_TILE = 16
MAX_PARTS = 3  # layers that one matrix product may hold: q, k and v


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What one adapter adds to one layer: ``B (A x) + gain * (W x)``.

    Args:
        a: (R, K), an unquantized format; rows beyond the adapter's rank are zero.
        b: (N, R) with the adapter's scaling in it, of the same format.
        gain: float32 [N] or None; DoRA's magnitude over norm, less one.
    """

    a: PackedTensor
    b: PackedTensor
    gain: Tensor | None = None


class FactorTable:
    """The terms of one adapter, by number of the layer.

    Args:
        entries: E of them, None where the adapter adds nothing.
        special: what is no low-rank term of a linear layer, by name of the tensor: the business of
            the layers, not of this op.

    Attributes:
        addresses: int64 [E, 3]: where A and B begin, and R; zeros where there is no entry.
        plain: nothing is special, and no entry has a gain.
        rank: the largest R;  layers: bit e is set where there is an entry.
    """

    def __init__(
        self,
        entries: Sequence[LowRank | None],
        device: torch.device,
        special: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.entries, self.special = tuple(entries), special
        lines = [
            [e.a.planes["w"].data_ptr(), e.b.planes["w"].data_ptr(), e.a.shape[0]] if e else [0] * 3
            for e in self.entries
        ]
        self.addresses = torch.tensor(lines, dtype=torch.int64, device=device)
        present = [entry for entry in self.entries if entry is not None]
        self.plain = not special and all(entry.gain is None for entry in present)
        self.rank = max((entry.a.shape[0] for entry in present), default=0)
        self.layers = sum(1 << number for number, entry in enumerate(self.entries) if entry)

    def changes(self, name: str, number: int) -> bool:
        """Does the adapter change a layer, given the name of its tensor and its number?"""
        return name in self.special or self.entries[number] is not None


class RowGroups:
    """Which rows of a step have which adapter: at most one per row.

    Args:
        tables: S adapters in use.
        slots: for each of P rows, in rising order, the index of its adapter in ``tables``.
        rows: P different row numbers.
        scales: P factors of what the adapter adds.

    Attributes:
        rows: int64 [P];  scales: float32 [P];  starts: S + 1 places in them, by adapter.
        tiles: int64 [T, 3]: address of the table of a tile's adapter, first place, place behind
            the last one; a tile has up to ROW_TILE places.
    """

    def __init__(
        self,
        tables: Sequence[FactorTable],
        slots: Sequence[int],
        rows: Sequence[int],
        scales: Sequence[float],
        device: torch.device,
    ) -> None:
        self.tables = tuple(tables)
        counts = [0] * len(self.tables)
        for slot in slots:
            counts[slot] += 1
        self.starts = [0]
        tiles = []
        for table, count in zip(self.tables, counts):
            start = self.starts[-1]
            self.starts.append(start + count)
            for first in range(start, start + count, ROW_TILE):
                stop = min(first + ROW_TILE, start + count)
                tiles.append([table.addresses.data_ptr(), first, stop])
        self.rows = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        self.scales = torch.tensor(scales, dtype=torch.float32).to(device, non_blocking=True)
        self.tiles = torch.tensor(tiles, dtype=torch.int64).to(device, non_blocking=True)

    def entries(self, first: int, parts: int) -> list[tuple[LowRank | None, ...]]:
        """For each adapter, its terms of ``parts`` layers from number ``first`` on."""
        return [table.entries[first : first + parts] for table in self.tables]

    def changes(self, first: int, parts: int) -> bool:
        """Whether some adapter adds something to one of these layers."""
        return any(entry is not None for terms in self.entries(first, parts) for entry in terms)

    def rank(self, first: int, parts: int) -> int:
        """The largest R of the terms of these layers."""
        terms = self.entries(first, parts)
        return max(entry.a.shape[0] for entries in terms for entry in entries if entry is not None)

    @property
    def dtype(self) -> torch.dtype:
        """Of all factors."""
        entries = (entry for table in self.tables for entry in table.entries if entry is not None)
        return next(entries).a.planes["w"].dtype


def lora(
    y: Tensor,
    x: Tensor,
    groups: RowGroups | LineGroups,
    first: int,
    sizes: Sequence[int],
    *,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    numerics: str = "invariant",
) -> Tensor:
    """``y[row] += scale * (B (A x[row]) + gain * (base[row] - bias))`` for every row of a group.

    Sums in float32, in an order that depends on nothing but the adapter. Rows without an adapter
    are not touched. (LoRA: Hu et al. 2021; DoRA: Liu et al. 2024.)

    Args:
        y: outputs of the layer, float32, bfloat16 or float16 [M, N]; changed in place.
        x: its inputs, any of these dtypes [M, K].
        groups: who has which adapter.
        first: number of the layer, or of the first of those that y holds side by side.
        sizes: outputs of each of those layers; N in all.
        base: y before any adapter was added; wanted only where a term has a gain.
        bias: float32 [N] or None, what of ``base`` is not W x.

    Returns:
        ``y``.

    Raises:
        ValueError: a shape that does not fit; says got and wanted.
        UnsupportedError: no backend, or none that a rule allows, serves the call.
    """
    _check(y, x, sizes)
    if not groups.changes(first, len(sizes)):
        return y
    call = registry.Call(y.device.type, x.dtype, numerics, m=len(groups.rows))
    kernel = registry.select("lora", call)
    if isinstance(groups, RowGroups):
        _add_gains(y, groups, first, sizes, base, bias)
    elif not kernel.takes_lines:
        raise UnsupportedError(f"lora={kernel.backend} in a CUDA graph")
    kernel.function(y, x, groups, first, tuple(sizes))
    return y


def _check(y: Tensor, x: Tensor, sizes: Sequence[int]) -> None:
    if y.ndim != 2 or y.shape[1] != sum(sizes) or y.stride(1) != 1:
        got = f"shape {tuple(y.shape)}, strides {y.stride()}"
        raise ValueError(f"y: got {got}, wanted (M, {sum(sizes)}) with adjacent outputs")
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted ({len(y)}, K)")
    if not 1 <= len(sizes) <= MAX_PARTS:
        raise ValueError(f"sizes: got {len(sizes)}, wanted 1 to {MAX_PARTS}")


def _add_gains(
    y: Tensor,
    groups: RowGroups,
    first: int,
    sizes: Sequence[int],
    base: Tensor | None,
    bias: Tensor | None,
) -> None:
    for slot, terms in enumerate(groups.entries(first, len(sizes))):
        places = slice(groups.starts[slot], groups.starts[slot + 1])
        for part, entry in enumerate(terms):
            if entry is None or entry.gain is None:
                continue
            assert base is not None, "a gain wants the outputs before adapters"
            columns = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
            rows, scales = groups.rows[places], groups.scales[places, None]
            product = base[rows, columns].float()
            if bias is not None:
                product = product - bias[columns].float()
            total = y[rows, columns].float() + scales * (entry.gain * product)
            y[rows, columns] = total.to(y.dtype)


def padded_rank(rank: int) -> int:
    """``rank`` rounded up to whole tiles."""
    return math.ceil(rank / RANK_TILE) * RANK_TILE


_HERE = "oxillama_torch.kernels.lora"
registry.declare("lora", f"{_HERE}.reference", f"{_HERE}.cpu", f"{_HERE}.triton_backend")
