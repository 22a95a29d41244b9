"""Runs a decoder on requests, step by step, over pages of its own: a small engine for tests."""

from __future__ import annotations

import random

import torch

from oxillama_torch.layers.attention import ForwardBatch
from oxillama_torch.models.decoder import Decoder

__all__ = ["PagedRunner"]


class PagedRunner:
    """Requests by name, each with pages in no particular order.

    Args:
        decoder: the model.
        num_pages, page_size: of the pools, which start out as NaN: nothing unwritten may be read.
    """

    def __init__(self, decoder: Decoder, *, num_pages: int = 64, page_size: int = 16) -> None:
        self.decoder = decoder
        self.page_size = page_size
        self.kv = [
            tuple(
                torch.full(
                    (num_pages, page_size, heads, dim),
                    float("nan"),
                    dtype=decoder.dtype,
                    device=decoder.device,
                )
                for dim in (key_dim, value_dim)
            )
            for heads, key_dim, value_dim in decoder.kv_shapes()
        ]
        self._free = list(range(num_pages))
        random.Random(0).shuffle(self._free)
        self._pages: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, chunks: dict[str, list[int]]) -> dict[str, torch.Tensor]:
        """Feed each request its next tokens; return their logits, float32 [tokens, V] each."""
        batch = self.batch(chunks)
        logits = self.decoder.logits(self.decoder(batch, self.kv))
        return dict(zip(chunks, logits.split([len(ids) for ids in chunks.values()])))

    def run(self, name: str, ids: list[int], chunk: int | None = None) -> torch.Tensor:
        """Feed one request all its tokens, ``chunk`` at a time; logits float32 [tokens, V]."""
        size = chunk or len(ids)
        parts = [self.step({name: ids[i : i + size]})[name] for i in range(0, len(ids), size)]
        return torch.cat(parts)

    def batch(self, chunks: dict[str, list[int]]) -> ForwardBatch:
        """Give the chunks pages and say where everything is."""
        positions, slots, starts = [], [], [0]
        for name, ids in chunks.items():
            first = self._lengths.get(name, 0)
            self._lengths[name] = first + len(ids)
            pages = self._pages.setdefault(name, [])
            while len(pages) * self.page_size < self._lengths[name]:
                pages.append(self._free.pop())
            for position in range(first, first + len(ids)):
                positions.append(position)
                page, offset = divmod(position, self.page_size)
                slots.append(pages[page] * self.page_size + offset)
            starts.append(starts[-1] + len(ids))
        lengths = [self._lengths[name] for name in chunks]
        width = max(len(self._pages[name]) for name in chunks)
        table = [self._pages[n] + [-1] * (width - len(self._pages[n])) for n in chunks]
        device = self.decoder.device
        return ForwardBatch(
            input_ids=torch.tensor([i for ids in chunks.values() for i in ids], device=device),
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            page_table=torch.tensor(table, dtype=torch.int32, device=device),
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            max_query_len=max(len(ids) for ids in chunks.values()),
            max_seq_len=max(lengths),
            logits_rows=torch.arange(starts[-1], device=device),
        )
