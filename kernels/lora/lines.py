"""Which rows of a step have which adapter, as tensors say it: for steps that are CUDA graphs.

``op.RowGroups`` is made for one step. What is here stays: others fill the tensors before a step,
and a step that was recorded finds in them what is wanted now.

Shapes: n rows of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LineGroups"]


class LineGroups:
    """Takes the place of ``RowGroups`` where a backend ``takes_lines``.

    Args:
        tiles: int64 [n, 3], see ``RowGroups``; one that nobody needs has a table of zeros.
        rows: int64 [n], places of the tiles are places in it;  scales: float32 [n].
        layers: bit e is set where an adapter may add something to layer e.
        rank: no term has a larger R.
        dtype: of all factors.

    Attributes:
        tables: none, they are known by their addresses only.
    """

    tables: tuple[()] = ()

    def __init__(
        self,
        tiles: Tensor,
        rows: Tensor,
        scales: Tensor,
        *,
        layers: int,
        rank: int,
        dtype: torch.dtype,
    ) -> None:
        self.tiles, self.rows, self.scales = tiles, rows, scales
        self.dtype, self._layers, self._rank = dtype, layers, rank

    def entries(self, first: int, parts: int) -> list:
        """Nothing, as of ``tables``."""
        return []

    def changes(self, first: int, parts: int) -> bool:
        """Whether some adapter may add something to ``parts`` layers from number ``first`` on."""
        return bool(self._layers >> first & (1 << parts) - 1)

    def rank(self, first: int, parts: int) -> int:
        """No term of these layers has a larger R."""
        return self._rank
