"""A scheduled step as tensors, built once per step with one copy per tensor.

Shapes: T tokens of the step, B requests, L most pages of one of them, S tokens per page, R rows
whose outputs are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from oxillama_torch.engine.state import ScheduledBatch, ScheduledItem
from oxillama_torch.kernels.lora.op import FactorTable
from oxillama_torch.layers.attention import ForwardBatch
from oxillama_torch.layers.lora import HEAD, AdapterBatch
from oxillama_torch.lora.attach import adapter_batch

__all__ = ["BatchBuilder", "StepInputs", "forward_batch"]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the model reads in one step, and whose rows come out.

    Args:
        forward: tensors for the decoder; its ``logits_rows`` are those of ``sampling`` in order,
            one each and one more per guess, then the positions of ``scoring`` in order.
        sampling: items whose next token is chosen.
        scoring: items with prompt positions whose outputs are collected.
    """

    forward: ForwardBatch
    sampling: tuple[ScheduledItem, ...]
    scoring: tuple[ScheduledItem, ...]


_NO_ROWS = np.zeros(0, np.int64)


class BatchBuilder:
    """Turns scheduled items into a ForwardBatch.

    The page table of running requests is kept from step to step; only new pages are written.

    Args:
        slots: most requests running at once.
        max_pages: most pages of one request.
        page_size: S.
        device: where the model runs.
        layers: numbers of the layers that adapters may change, see AdapterBatch.

    Attributes:
        layers: as given.
    """

    def __init__(
        self,
        *,
        slots: int,
        max_pages: int,
        page_size: int,
        device: torch.device | str,
        layers: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._page_size, self._device, self.layers = page_size, torch.device(device), layers
        self._table = np.zeros((slots, max_pages), np.int32)

    @property
    def max_pages(self) -> int:
        """Most pages of one request."""
        return self._table.shape[1]

    def build(self, batch: ScheduledBatch) -> StepInputs:
        """Tensors of one step. The batch must not be empty."""
        items = batch.items
        input_ids: list[int] = []
        for item in items:
            input_ids += item.state.token_ids[item.start : item.stop]
            input_ids += item.guesses
            self.sync(item)
        widths = [item.width for item in items]
        longest = max(item.start + item.width for item in items)
        slots = [item.state.slot for item in items]
        sampling = tuple(item for item in items if item.samples)
        scoring = tuple(item for item in items if item.scored_positions)
        forward = forward_batch(
            input_ids,
            starts=np.array([item.start for item in items]),
            counts=np.array(widths),
            table=self._table[slots, : -(-longest // self._page_size)],
            page_size=self._page_size,
            device=self._device,
            logits_rows=_output_rows(items, np.cumsum(widths)),
            adapters=self._adapters(items, widths),
        )
        return StepInputs(forward, sampling, scoring)

    def head_adapters(
        self, items: Sequence[ScheduledItem], counts: Sequence[int]
    ) -> AdapterBatch | None:
        """Adapters that change the head, for rows whose logits are wanted: so many of each item."""
        head = self.layers.get(HEAD, -1)
        if not any(table.changes(HEAD, head) for i in items for table, _ in _uses(i)):
            return None
        return self._adapters(items, counts)

    def sync(self, item: ScheduledItem) -> range:
        """Copy pages that a request got since it was last seen into its line of the table.

        Returns: which of its pages they are.
        """
        held = item.state.held
        new = range(held.synced, len(held.pages))
        if new:
            self._table[item.state.slot, held.synced : len(held.pages)] = held.pages[held.synced :]
            held.synced = len(held.pages)
        return new

    def _adapters(
        self, items: Sequence[ScheduledItem], counts: Sequence[int]
    ) -> AdapterBatch | None:
        if not any(item.state.adapters for item in items):
            return None
        return adapter_batch(self.layers, [_uses(i) for i in items], counts, self._device)


def forward_batch(
    input_ids: Sequence[int],
    *,
    starts: np.ndarray,
    counts: np.ndarray,
    table: np.ndarray,
    page_size: int,
    device: torch.device,
    logits_rows: np.ndarray = _NO_ROWS,
    adapters: AdapterBatch | None = None,
) -> ForwardBatch:
    """Tensors of tokens that follow each other in their requests.

    Args:
        input_ids: T ids, requests one after the other.
        starts, counts: int64 [B], first position and number of tokens of each request.
        table: int32 [B, at least L], its pages.
        page_size: S.
        device: of the tensors.
        logits_rows, adapters: see ForwardBatch.
    """

    def tensor(values: np.ndarray | Sequence[int], dtype: type) -> torch.Tensor:
        array = np.ascontiguousarray(values, dtype)
        return torch.from_numpy(array).to(device, non_blocking=True)

    ends = np.cumsum(counts)
    positions = np.arange(len(input_ids)) + np.repeat(starts - (ends - counts), counts)
    pages = table[np.repeat(np.arange(len(counts)), counts), positions // page_size]
    seq_lens = starts + counts
    max_seq_len = int(seq_lens.max())
    return ForwardBatch(
        input_ids=tensor(input_ids, np.int64),
        positions=tensor(positions, np.int64),
        slot_mapping=tensor(pages.astype(np.int64) * page_size + positions % page_size, np.int64),
        page_table=tensor(table[:, : -(-max_seq_len // page_size)], np.int32),
        query_start=tensor(np.concatenate([[0], ends]), np.int32),
        seq_lens=tensor(seq_lens, np.int32),
        max_query_len=int(counts.max()),
        max_seq_len=max_seq_len,
        logits_rows=tensor(logits_rows, np.int64),
        adapters=adapters,
    )


def _uses(item: ScheduledItem) -> list[tuple[FactorTable, float]]:
    return [(loaded.table, scale) for loaded, scale in item.state.adapters]


def _output_rows(items: tuple[ScheduledItem, ...], ends: np.ndarray) -> np.ndarray:
    """Rows of the step [T] whose outputs are wanted: sampling ones first, then scored ones."""
    known = [int(end) - len(item.guesses) for item, end in zip(items, ends)]
    sampled = [
        row
        for item, end in zip(items, known)
        if item.samples
        for row in range(end - 1, end + len(item.guesses))
    ]
    scored = [
        end - item.stop + position
        for item, end in zip(items, known)
        for position in item.scored_positions
    ]
    return np.array(sampled + scored, np.int64)
