"""Which adapters the lines of a decode step have: tensors that stay where they are.

A request's first adapter belongs to round 0, its second one to round 1 and so on. In each round
lines of one adapter share tiles of up to ROW_TILE; tiles that nobody needs have a table without
entries. So a recorded step serves any adapters, whoever has them, as long as they add to no other
layers and have no larger ranks than when it was recorded.

Shapes: B lines, n of them in a step, M rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from oxillama_torch.kernels import registry
from oxillama_torch.kernels.lora.lines import LineGroups
from oxillama_torch.kernels.lora.op import ROW_TILE, FactorTable
from oxillama_torch.layers.lora import AdapterBatch
from oxillama_torch.lora.registry import LoadedAdapter

__all__ = ["MAX_ROUNDS", "AdapterLines", "AdapterShape", "Adapters"]

#: Requests with more adapters are computed without lines.
MAX_ROUNDS = 4

#: A request's adapters and their scales, in its order.
Adapters = Sequence[tuple[LoadedAdapter, float]]


class AdapterShape(NamedTuple):
    """What a step with adapters is recorded for.

    Args:
        rounds: most adapters of a line.
        layers: bit e is set where an adapter may add something to layer e.
        rank: no term has a larger one.
    """

    rounds: int
    layers: int
    rank: int


class AdapterLines:
    """The adapters of B lines.

    Args:
        numbers: of the layers that adapters may change, see AdapterBatch.
        lines: B.
        device, dtype, numerics: of the model.
    """

    def __init__(
        self,
        numbers: Mapping[str, int],
        lines: int,
        device: torch.device,
        dtype: torch.dtype,
        numerics: str,
    ) -> None:
        self._numbers, self._lines, self._dtype, self._numerics = numbers, lines, dtype, numerics
        self._nothing = FactorTable([None] * len(numbers), device)
        self._places = torch.zeros(MAX_ROUNDS, 4 * lines, dtype=torch.int64, device=device)
        self._scales = torch.zeros(MAX_ROUNDS, lines, dtype=torch.float32, device=device)
        self._written: list[list[tuple[int, float]]] | None = None
        self._layers = self._rank = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (self._places, self._scales, self._nothing.addresses))

    def serves(self, adapters: Adapters) -> bool:
        """Whether a request with these adapters may stand in a line."""
        if len(adapters) > MAX_ROUNDS or not all(loaded.table.plain for loaded, _ in adapters):
            return False
        call = registry.Call(self._places.device.type, self._dtype, self._numerics, m=self._lines)
        return registry.select("lora", call).takes_lines

    def write(self, uses: Sequence[Adapters]) -> AdapterShape:
        """Give lines their adapters.

        Args:
            uses: of each of the B lines, nothing where a line has none.

        Returns: what a step with them must have been recorded for. Layers and rank are those of
            all adapters so far, so that adapters alternating make no graphs anew.
        """
        assert len(uses) == self._lines, f"adapters of {len(uses)} lines, there are {self._lines}"
        tables = [loaded.table for use in uses for loaded, _ in use]
        for table in tables:
            self._layers |= table.layers
            self._rank = max(self._rank, table.rank)
        # By address: who looks at a table that has gone is written before a step looks there.
        wanted = [[(_address(a.table), float(scale)) for a, scale in use] for use in uses]
        if wanted != self._written:
            self._written = None  # until both copies are under way
            self._copy(wanted)
            self._written = wanted
        return AdapterShape(max(map(len, uses)), self._layers, self._rank)

    def batch(self, shape: AdapterShape, count: int) -> AdapterBatch:
        """The adapters of the first ``count`` lines, as layers see them; reads no value."""
        rounds = []
        for places, scales in zip(self._places[: shape.rounds], self._scales):
            tiles, rows = places[: 3 * count].view(count, 3), places[3 * self._lines :]
            rounds.append(
                LineGroups(
                    tiles, rows[:count], scales[:count],
                    layers=shape.layers, rank=shape.rank, dtype=self._dtype,
                )
            )  # fmt: skip
        return AdapterBatch(self._numbers, rounds)

    def _copy(self, uses: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Tables by address and scales, of each line, to the device."""
        lines = self._lines
        places = np.zeros((MAX_ROUNDS, 4 * lines), np.int64)
        scales = np.zeros((MAX_ROUNDS, lines), np.float32)
        for number in range(MAX_ROUNDS):
            tiles, rows, factors = _grouped(
                [use[number] if number < len(use) else None for use in uses]
            )
            tiles += [(_address(self._nothing), 0, 0)] * (lines - len(tiles))
            places[number, : 3 * lines] = np.array(tiles, np.int64).flatten()
            places[number, 3 * lines : 3 * lines + len(rows)] = rows
            scales[number, : len(factors)] = factors
        self._places.copy_(torch.from_numpy(places), non_blocking=True)
        self._scales.copy_(torch.from_numpy(scales), non_blocking=True)


def _grouped(
    uses: Sequence[tuple[int, float] | None],
) -> tuple[list[tuple[int, int, int]], list[int], list[float]]:
    """Tiles, lines and scales of one round, lines of one table next to each other."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for line, use in enumerate(uses):
        if use is not None:
            groups.setdefault(use[0], []).append((line, use[1]))
    tiles, rows, scales = [], [], []
    for address, members in groups.items():
        for start in range(0, len(members), ROW_TILE):
            tile = members[start : start + ROW_TILE]
            tiles.append((address, len(rows), len(rows) + len(tile)))
            rows += [line for line, _ in tile]
            scales += [scale for _, scale in tile]
    return tiles, rows, scales


def _address(table: FactorTable) -> int:
    return table.addresses.data_ptr()
