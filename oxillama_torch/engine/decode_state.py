"""What a decode step reads and what it leaves for the next one: tensors that stay where they are.

A running request has a *line*. Steps feed themselves (token, position, tokens seen); the host only
writes lines of requests that are new to them, and pages that a request has got.

Shapes: B lines, n of them in a step, L most pages of a request, V vocabulary, W words of a mask,
H most tokens that a penalised row has seen, E end tokens known to the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from oxillama_torch.kernels.sampling.op import Penalties, Settings

__all__ = ["END_IDS", "HISTORY", "DecodeState"]

#: Of a request with more end tokens, the device knows the first: the others only cost a wasted row.
END_IDS = 8
#: Requests with penalties that have seen more distinct tokens are computed without lines.
HISTORY = 2048

_COLUMNS = {
    torch.int64: ("input_ids", "positions", "active", "seeds", "seen"),
    torch.int32: ("top_k",),
    torch.float64: ("top_p", "min_p"),
    torch.float32: ("temperature", "repetition", "frequency", "presence"),
}
_DTYPES = {name: dtype for dtype, names in _COLUMNS.items() for name in names}
_NUMPY = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.float64: np.float64,
    torch.float32: np.float32,
}


class DecodeState:
    """The lines.

    Args:
        lines: B.
        max_pages: L.
        vocab_size: V.
        device: of the model.

    Attributes:
        page_table: int32 [B, L];  end_ids: int64 [E, B], -1: none.
        token_ids: int64 [B, H] and counts: int32 [B, H], what penalties look at.
        bitmask: int32 [B, W], tokens that a grammar allows.
        query_start: int32 [B + 1], every line one token.
        logits: float32 [B, V], raw, of the latest step.
        outcomes: float64 [B, 5] of the latest step, see ``sampling.sampler.outcomes``.
    """

    def __init__(
        self, lines: int, max_pages: int, vocab_size: int, device: torch.device | str
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.lines, self.device = lines, torch.device(device)
        self._columns = {
            dtype: zeros(len(names), lines, dtype=dtype) for dtype, names in _COLUMNS.items()
        }
        history = min(HISTORY, vocab_size)
        self.page_table = zeros(lines, max_pages, dtype=torch.int32)
        self.end_ids = zeros(END_IDS, lines, dtype=torch.int64) - 1
        self.token_ids = zeros(lines, history, dtype=torch.int64) - 1
        self.counts = zeros(lines, history, dtype=torch.int32)
        self.bitmask = zeros(lines, -(-vocab_size // 32), dtype=torch.int32)
        self.query_start = torch.arange(lines + 1, dtype=torch.int32, device=device)
        self.logits = zeros(lines, vocab_size, dtype=torch.float32)
        self.outcomes = zeros(lines, 5, dtype=torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*vars(self).values(), *self._columns.values()]
        return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))

    def column(self, name: str, count: int | None = None) -> torch.Tensor:
        """One value per line, of the first ``count`` lines."""
        dtype = _DTYPES[name]
        return self._columns[dtype][_COLUMNS[dtype].index(name), :count]

    def settings(self, count: int) -> Settings:
        """How the first ``count`` lines are sampled; they look at ``positions`` as it is now."""
        names = ("temperature", "top_k", "top_p", "min_p", "seeds")
        chosen_at = self.column("positions", count) + 1
        return Settings(*(self.column(name, count) for name in names), chosen_at)

    def penalties(self, count: int) -> Penalties:
        """What the first ``count`` lines lose for tokens they have seen."""
        names = ("repetition", "frequency", "presence")
        seen = self.token_ids[:count], self.counts[:count]
        return Penalties(*seen, *(self.column(name, count) for name in names))

    def write(
        self,
        lines: Sequence[int],
        columns: Mapping[str, Sequence[float]],
        end_ids: Sequence[Sequence[int]],
    ) -> None:
        """Other requests in some lines.

        Args:
            lines: which.
            columns: of every column, the values of these lines.
            end_ids: tokens that end each of them.
        """
        index = self._on_device(np.array(lines, np.int64))
        for dtype, names in _COLUMNS.items():
            values = np.array([columns[name] for name in names], _NUMPY[dtype])
            self._columns[dtype].index_copy_(1, index, self._on_device(values))
        table = np.full((END_IDS, len(lines)), -1)
        for place, ids in enumerate(end_ids):
            table[: len(ids), place] = ids[:END_IDS]
        self.end_ids.index_copy_(1, index, self._on_device(table))

    def write_pages(
        self, lines: Sequence[int], places: Sequence[int], pages: Sequence[int]
    ) -> None:
        """``page_table[line, place] = page`` for each of the three."""
        entries = self._on_device(np.array([lines, places, pages], np.int64))
        line, place, page = entries.unbind(0)
        self.page_table.index_put_((line, place), page.to(torch.int32))

    def write_history(
        self, lines: Sequence[int], seen: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """What some lines have seen: token ids, and how often each counts."""
        token_ids = np.full((len(lines), self.token_ids.shape[1]), -1)
        counts = np.zeros(token_ids.shape, np.int32)
        for place, (ids, times) in enumerate(seen):
            token_ids[place, : len(ids)], counts[place, : len(ids)] = ids, times
        index = self._on_device(np.array(lines, np.int64))
        self.token_ids.index_copy_(0, index, self._on_device(token_ids))
        self.counts.index_copy_(0, index, self._on_device(counts))

    def write_bitmask(self, count: int, lines: Sequence[int], words: np.ndarray) -> None:
        """Masks int32 [lines, W] of some of the first ``count`` lines; the others may do all."""
        self.bitmask[:count].fill_(-1)
        index = self._on_device(np.array(lines, np.int64))
        self.bitmask.index_copy_(0, index, self._on_device(words))

    def deactivate(self, lines: Sequence[int]) -> None:
        """From here on, lines write nothing and stay where they are."""
        if lines:
            index = self._on_device(np.array(lines, np.int64))
            self.column("active").index_fill_(0, index, 0)

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
