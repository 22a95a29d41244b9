"""Graphs of the forward pass over a short prompt, or a chunk of one, that has a step to itself.

The tokens are padded to one of a few numbers. Rows without a token belong to a second request that
nobody has made: it stores no key or value (slot -1), looks at whatever page 0 holds, and is read by
nobody. Outputs are chosen, scored or kept outside the graph, as of any other step.

Shapes: T tokens of the step, C most of them, L most pages of a request, D hidden size.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.batch import BatchBuilder
from oxillama_torch.engine.graphs import GraphDevice, reaches
from oxillama_torch.kernels import registry
from oxillama_torch.kvcache.pool import KVPool
from oxillama_torch.layers.attention import ForwardBatch

__all__ = ["PrefillGraphs", "prefill_graphs", "token_counts"]

_LEAST = 16

log = logging.getLogger(__name__)


def token_counts(most: int) -> list[int]:
    """Numbers of tokens that graphs are made for: 16, 32, 64 and so on up to ``most``."""
    counts = []
    while not counts or counts[-1] < most:
        counts.append(min(counts[-1] * 2 if counts else _LEAST, most))
    return counts


class PrefillGraphs:
    """Graphs by number of tokens and reach.

    Args:
        model: the decoder.
        pool: keys and values.
        device: records and replays.
        max_pages: L.
        most_tokens: C, cut to what L pages hold: the padding has pages of its own to look at.

    Attributes:
        steps: computed from graphs since the start.
    """

    def __init__(
        self, model, pool: KVPool, device: GraphDevice, *, max_pages: int, most_tokens: int
    ) -> None:
        self._model, self._pool, self._device = model, pool, device
        longest = max_pages * pool.page_size
        most_tokens = min(most_tokens, longest)
        self._counts, self._reaches = token_counts(most_tokens), reaches(longest)
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self.steps = 0

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self._batch = ForwardBatch(
            input_ids=zeros(most_tokens, dtype=torch.int64),
            positions=zeros(most_tokens, dtype=torch.int64),
            slot_mapping=zeros(most_tokens, dtype=torch.int64),
            page_table=zeros(2, max_pages, dtype=torch.int32),
            query_start=zeros(3, dtype=torch.int32),
            seq_lens=zeros(2, dtype=torch.int32),
            max_query_len=most_tokens,
            max_seq_len=self._reaches[-1],
            logits_rows=zeros(0, dtype=torch.int64),  # every row comes out
        )
        # Not in the graphs' own memory, where the next one that runs would overwrite it.
        self._hidden = zeros(most_tokens, model.config.hidden_size, dtype=model.dtype)

    def __len__(self) -> int:
        return len(self._graphs)

    def serves(self, batch: ForwardBatch) -> bool:
        """Whether a step is one request's, without adapters and short enough."""
        alone = len(batch.seq_lens) == 1 and batch.adapters is None
        short = len(batch.input_ids) <= self._counts[-1]
        return alone and short and not registry.is_observed()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """As the decoder's: hidden states [T, D], which stay until the next call."""
        tokens = len(batch.input_ids)
        count = self._counts[bisect.bisect_left(self._counts, tokens)]
        reach = self._reaches[bisect.bisect_left(self._reaches, batch.max_seq_len)]
        graph = self._graph(count, reach)  # recording runs it, on whatever the tensors hold
        mine = self._batch
        for name in ("input_ids", "positions", "slot_mapping"):
            getattr(mine, name)[:tokens].copy_(getattr(batch, name))
        mine.page_table[:1, : batch.page_table.shape[1]].copy_(batch.page_table)
        mine.seq_lens[:1].copy_(batch.seq_lens)
        self._pad(tokens, count)
        graph()
        self.steps += 1
        return self._hidden[:tokens]

    def shapes(self) -> list[tuple[int, int]]:
        """(tokens, reach) of what is recorded at the start, the largest first.

        Prompts this short stand in short contexts, unless a long prefix was cached: graphs for
        longer ones are recorded when they are first wanted.
        """
        return [(count, self._reaches[0]) for count in reversed(self._counts)]

    def capture(self, shape: tuple[int, int]) -> None:
        """Record one of ``shapes``."""
        self._graph(*shape)

    def drop(self) -> None:
        """Forget all graphs: weights or kernels are others now."""
        if self._graphs:
            self._device.finish()
            self._graphs.clear()

    def _graph(self, count: int, reach: int) -> Callable[[], None]:
        graph = self._graphs.get((count, reach))
        if graph is None:
            log.debug("capturing a prompt of %d tokens, context up to %d", count, reach)
            self._batch.seq_lens.fill_(1)
            self._pad(0, count)
            graph = self._device.capture(lambda: self._run(count, reach))
            self._graphs[count, reach] = graph
        return graph

    def _pad(self, tokens: int, count: int) -> None:
        """Give the rows behind the first ``tokens`` to the second request."""
        mine = self._batch
        mine.slot_mapping[tokens:count].fill_(-1)
        mine.seq_lens[1:].fill_(max(count - tokens, 1))
        mine.query_start[1:2].fill_(tokens)
        mine.query_start[2:].fill_(count)

    def _run(self, count: int, reach: int) -> None:
        mine = self._batch
        batch = replace(
            mine,
            input_ids=mine.input_ids[:count],
            positions=mine.positions[:count],
            slot_mapping=mine.slot_mapping[:count],
            max_query_len=count,
            max_seq_len=reach,
        )
        self._hidden[:count].copy_(self._model(batch, self._pool.layers))


def prefill_graphs(
    model, pool: KVPool, builder: BatchBuilder, device: GraphDevice, config: EngineConfig
) -> PrefillGraphs | None:
    """The graphs of an engine's short prompts, if it is to have any."""
    most = min(config.graph_prompt_tokens, config.max_batch_tokens)
    if not most:
        return None
    return PrefillGraphs(model, pool, device, max_pages=builder.max_pages, most_tokens=most)
