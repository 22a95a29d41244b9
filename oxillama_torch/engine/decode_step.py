"""One decode step on the lines of a ``DecodeState``, such that it can be part of a CUDA graph.

Nothing here waits for the device, asks it for a value or makes a tensor whose shape hangs on one.
Lines that are not active store no key or value (slot -1) and leave their own state as it is, so a
step may have more lines than requests, and may be run before anything is there.

Shapes: n lines, V vocabulary, H most tokens that a penalised row has seen.
"""

from __future__ import annotations

import torch

from oxillama_torch.engine.decode_state import DecodeState
from oxillama_torch.kernels.sampling.op import sample
from oxillama_torch.kvcache.pool import KVPool
from oxillama_torch.layers.attention import ForwardBatch
from oxillama_torch.layers.lora import AdapterBatch
from oxillama_torch.sampling.chain import Picked
from oxillama_torch.sampling.sampler import finite_rows, outcomes

__all__ = ["DecodeStep"]


class DecodeStep:
    """Forward pass, choice of a token and its feedback.

    Args:
        model: the decoder.
        pool: keys and values.
        state: the lines.
        banned: int64 ids that no line may choose; None: none.
    """

    def __init__(
        self, model, pool: KVPool, state: DecodeState, banned: torch.Tensor | None = None
    ) -> None:
        self._model, self._pool, self._state, self._banned = model, pool, state, banned

    def forward(self, count: int, max_seq_len: int, adapters: AdapterBatch | None = None) -> None:
        """Logits of the first ``count`` lines, none of them longer than ``max_seq_len`` tokens."""
        state, page_size = self._state, self._pool.page_size
        positions, table = state.column("positions", count), state.page_table[:count]
        page = table.gather(1, (positions // page_size)[:, None])[:, 0].to(torch.int64)
        slots = page * page_size + positions % page_size
        batch = ForwardBatch(
            input_ids=state.column("input_ids", count),
            positions=positions,
            slot_mapping=slots.masked_fill(state.column("active", count) == 0, -1),
            page_table=table,
            query_start=state.query_start[: count + 1],
            seq_lens=(positions + 1).to(torch.int32),
            max_query_len=1,
            max_seq_len=max_seq_len,
            logits_rows=positions,  # every row is wanted: nobody reads this
            adapters=adapters,
        )
        hidden = self._model(batch, self._pool.layers)
        state.logits[:count].copy_(self._model.logits(hidden, adapters))

    def choose(self, count: int, *, penalised: bool, masked: bool) -> None:
        """A token for each of the first ``count`` lines, fed back for the next step.

        Args:
            penalised: some line has penalties.
            masked: some line has a grammar, ``DecodeState.bitmask`` says what it allows.
        """
        state, logits = self._state, self._state.logits[:count]
        allowed = logits
        if self._banned is not None:
            allowed = allowed.index_fill(1, self._banned, -torch.inf)
        ids, _, _ = sample(
            allowed,
            state.settings(count),
            bitmask=state.bitmask[:count] if masked else None,
            penalties=state.penalties(count) if penalised else None,
            numerics=self._model.numerics,
        )
        possible = allowed.gather(1, ids[:, None])[:, 0] > -torch.inf
        if masked:
            words = state.bitmask[:count].gather(1, ids[:, None] // 32)[:, 0]
            possible &= words.bitwise_right_shift(ids.to(torch.int32) % 32) & 1 == 1
        ones = torch.ones_like(ids)
        found = outcomes(Picked(ids, ones, ones), finite_rows(logits), possible)
        state.outcomes[:count].copy_(found)
        if penalised:
            self._remember(count, ids)
        self._feed_back(count, ids)

    def _feed_back(self, count: int, ids: torch.Tensor) -> None:
        """Tokens become inputs; a line whose token ends its request is active no longer."""
        state = self._state
        active = state.column("active", count)
        input_ids = state.column("input_ids", count)
        input_ids.copy_(ids.where(active > 0, input_ids))
        ended = (state.end_ids[:, :count] == ids).any(0)
        active.mul_(~ended)
        state.column("positions", count).add_(active)

    def _remember(self, count: int, ids: torch.Tensor) -> None:
        """Count the tokens; one that is new to its line is appended."""
        state = self._state
        token_ids, counts = state.token_ids[:count], state.counts[:count]
        active, seen = state.column("active", count), state.column("seen", count)
        hits = token_ids == ids[:, None]
        known = hits.any(-1)
        place = hits.to(torch.int32).argmax(-1).where(known, seen)
        place = place.clamp(max=token_ids.shape[1] - 1)[:, None]
        there = token_ids.gather(1, place)
        token_ids.scatter_(1, place, ids[:, None].where(active[:, None] > 0, there))
        counts.scatter_add_(1, place, active[:, None].to(torch.int32))
        seen.add_(active * ~known)
