"""A draft model: a small one with the same vocabulary guesses greedily, the large one checks.

Its keys and values lie in a pool of its own with the page numbers of the large model's: what one
request's pages are, which are shared, found again or given up, is decided once. Of each page it is
remembered how many leading tokens the draft has computed since the page was given out. So a prefix
found in the cache, a preempted request that comes back, one that has not guessed for a while: each
is computed from where its pages end to be known.

Keys and values of guesses are never counted: a guess that turns out right is computed again, in the
same pass as the token behind it.

Source: Leviathan et al. 2023, arXiv:2211.17192.

Shapes: B requests, T tokens, S tokens per page, L pages per request, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oxillama_torch.engine.batch import forward_batch
from oxillama_torch.engine.speculation.proposer import Wish
from oxillama_torch.kernels.kv_formats import KVFormat
from oxillama_torch.kvcache.holdings import PageManager
from oxillama_torch.kvcache.pool import KVPool
from oxillama_torch.layers.attention import ForwardBatch
from oxillama_torch.models.decoder import Decoder

__all__ = ["DraftProposer"]


@dataclass(frozen=True, slots=True)
class _Run:
    """One request's share of the first pass: tokens ``start .. stop - 1``.

    ``most``: guesses wanted; 0 where the pass does not reach the last token.
    """

    index: int
    wish: Wish
    start: int
    stop: int
    most: int

    @property
    def pages(self) -> list[int]:
        return self.wish.state.held.pages


class DraftProposer:
    """Guesses with a model.

    Args:
        model: the draft.
        pages: those of the large model.
        format: of keys and values.
        max_batch_tokens: tokens of one pass; a long prompt takes several steps.
        vocab_size: of the large model; no guess lies beyond.
    """

    def __init__(
        self,
        model: Decoder,
        pages: PageManager,
        format: KVFormat,
        *,
        max_batch_tokens: int,
        vocab_size: int,
    ) -> None:
        self._model, self._max_batch_tokens = model, max_batch_tokens
        self._size = pages.page_size
        num_pages = pages.allocator.num_pages
        self._pool = KVPool(
            model.kv_shapes(),
            num_pages=num_pages,
            page_size=self._size,
            format=format,
            device=model.device,
        )
        self._tenures = np.frombuffer(pages.allocator.tenures, np.int64)
        # Leading tokens of each page that are computed, and the tenure in which they were.
        self._filled = np.zeros(num_pages, np.int64)
        self._filled_in = np.zeros(num_pages, np.int64)
        self._context = model.config.context_length
        self._ids = min(vocab_size, model.config.vocab_size)

    def propose(self, wishes: Sequence[Wish]) -> list[Sequence[int]]:
        guesses: list[Sequence[int]] = [()] * len(wishes)
        runs = self._plan(wishes)
        if not runs:
            return guesses
        ids_B = self._first_pass(runs)
        # Those that want most come first, so that those still at it are always a head of the batch.
        ready = sorted((run for run in runs if run.most), key=lambda run: -run.most)
        if ready:
            order = [i for run in ready for i, other in enumerate(runs) if other is run]
            found = self._guess(ready, ids_B[torch.tensor(order, device=ids_B.device)])
            for run, column in zip(ready, found.T.tolist()):
                guesses[run.index] = column[: run.most]
        return guesses

    def _plan(self, wishes: Sequence[Wish]) -> list[_Run]:
        """What the first pass computes, within the budget."""
        runs, budget = [], self._max_batch_tokens
        for index, wish in enumerate(wishes):
            known = len(wish.state.token_ids)
            most = min(wish.most, self._context - known)
            start = self._computed(wish.state.held.pages, known)
            stop = min(known, start + budget)
            if most > 0 and stop > start:
                budget -= stop - start
                runs.append(_Run(index, wish, start, stop, most if stop == known else 0))
        return runs

    def _computed(self, pages: Sequence[int], known: int) -> int:
        """Leading tokens of a request whose keys and values are there; not its last one."""
        index = np.array(pages)
        filled = np.where(self._filled_in[index] == self._tenures[index], self._filled[index], 0)
        short = np.flatnonzero(filled < self._size)
        whole = int(short[0]) if len(short) else len(index)
        more = int(filled[whole]) if whole < len(index) else 0
        return min(whole * self._size + more, known - 1)

    def _first_pass(self, runs: Sequence[_Run]) -> torch.Tensor:
        """Compute what is known. Returns: int64 [B], the likeliest token behind each."""
        input_ids = [i for run in runs for i in run.wish.state.token_ids[run.start : run.stop]]
        batch = forward_batch(
            np.minimum(input_ids, self._model.config.vocab_size - 1),
            starts=np.array([run.start for run in runs]),
            counts=np.array([run.stop - run.start for run in runs]),
            table=self._table(runs, [run.stop for run in runs]),
            page_size=self._size,
            device=self._model.device,
        )
        hidden = self._model(batch, self._pool.layers)
        for run in runs:
            self._mark(run)
        return self._likeliest(hidden[batch.query_start[1:].to(torch.int64) - 1])

    def _mark(self, run: _Run) -> None:
        """Remember what a pass has computed."""
        for number in range(run.start // self._size, -(-run.stop // self._size)):
            page = run.pages[number]
            self._filled[page] = min(self._size, run.stop - number * self._size)
            self._filled_in[page] = self._tenures[page]

    def _guess(self, runs: Sequence[_Run], ids_B: torch.Tensor) -> np.ndarray:
        """Go on token by token. Returns: int64 [most, B]; a column counts as far as wanted."""
        device, known = self._model.device, [run.stop for run in runs]
        table_BL = torch.from_numpy(self._table(runs, [run.stop + run.most for run in runs]))
        table_BL = table_BL.to(device, non_blocking=True)
        positions_B = torch.tensor(known, device=device)
        steps = [ids_B]
        for step in range(1, runs[0].most):
            active = sum(run.most > step for run in runs)
            batch = self._one_each(
                steps[-1][:active], positions_B[:active], table_BL[:active], max(known) + step
            )
            ids = self._likeliest(self._model(batch, self._pool.layers))
            steps.append(torch.cat([ids, ids_B[active:]]))
            positions_B = positions_B + 1
        return torch.stack(steps).cpu().numpy()

    def _one_each(
        self, ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, longest: int
    ) -> ForwardBatch:
        """One token per request, made on the device: its ids are not known to the host."""
        pages = table.gather(1, (positions // self._size)[:, None])[:, 0].to(torch.int64)
        return ForwardBatch(
            input_ids=ids,
            positions=positions,
            slot_mapping=pages * self._size + positions % self._size,
            page_table=table,
            query_start=torch.arange(len(ids) + 1, dtype=torch.int32, device=ids.device),
            seq_lens=(positions + 1).to(torch.int32),
            max_query_len=1,
            max_seq_len=longest,
            logits_rows=torch.arange(len(ids), device=ids.device),
        )

    def _likeliest(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)[:, : self._ids].argmax(-1)

    def _table(self, runs: Sequence[_Run], tokens: Sequence[int]) -> np.ndarray:
        """int32 [B, L]: pages of so many tokens of each request."""
        lengths = [-(-count // self._size) for count in tokens]
        table = np.zeros((len(runs), max(lengths)), np.int32)
        for line, run, length in zip(table, runs, lengths):
            line[:length] = run.pages[:length]
        return table
