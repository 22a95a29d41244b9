"""A model whose next token is a known function of everything before it, read back from the pages.

It writes each token's id into the KV pages and derives the logits from the ids it finds there, so
that a wrong page, slot, position or length changes the output. ``continuation`` says what comes out
from the token list alone.

B requests, T tokens of a step, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from oxillama_torch.layers.attention import ForwardBatch

__all__ = ["CRASH_ID", "NAN_ID", "ScriptedModel", "context_logits", "continuation"]

#: A prompt that holds this id makes the forward pass raise.
CRASH_ID = 3
#: From this id on, a request's hidden states are NaN.
NAN_ID = 4

_MODULUS = 1_000_003


def _fold(state: int, token_id: int) -> int:
    return (state * 31 + token_id + 17) % _MODULUS


def _logits(states: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """float32 [R, V] from int64 [R], between 0 and 8; ids with a meaning do not come up."""
    ids = torch.arange(vocab_size)
    logits = ((states[:, None] * (ids + 7) * 9176 + ids * 31) % 8011).to(torch.float32) / 1000
    logits[:, [CRASH_ID, NAN_ID]] = -20
    return logits


def context_logits(token_ids: list[int], vocab_size: int) -> torch.Tensor:
    """Logits float32 [V] that follow a list of tokens."""
    state = 0
    for token_id in token_ids:
        state = _fold(state, token_id)
    return _logits(torch.tensor([state]), vocab_size)[0]


def continuation(prompt: list[int], count: int, vocab_size: int, end_ids: set[int]) -> list[int]:
    """Greedy tokens after ``prompt``, up to an end token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(int(context_logits(tokens, vocab_size).argmax()))
        if tokens[-1] in end_ids:
            break
    return tokens[len(prompt) :]


class ScriptedModel:
    """Stands in for ``models.decoder.Decoder``.

    Args:
        vocab_size, context_length: as in a model's config.
        on_forward: called with every batch before it is computed; may raise or wait.
    """

    dtype = torch.float32
    numerics = "invariant"
    device = torch.device("cpu")

    def __init__(
        self,
        vocab_size: int = 61,
        context_length: int = 512,
        on_forward: Callable[[ForwardBatch], None] | None = None,
    ) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size, context_length=context_length)
        self.on_forward = on_forward
        self.batches: list[ForwardBatch] = []

    def kv_shapes(self) -> list[tuple[int, int, int]]:
        return [(1, 1, 1)]

    def __call__(self, batch: ForwardBatch, kv: list) -> torch.Tensor:
        self.batches.append(batch)
        if self.on_forward is not None:
            self.on_forward(batch)
        if CRASH_ID in batch.input_ids.tolist():
            raise RuntimeError("scripted failure")
        k_pages, v_pages = kv[0]
        stored = batch.input_ids.to(torch.float32)
        kept = batch.slot_mapping >= 0
        slots, stored = batch.slot_mapping[kept], stored[kept]
        k_pages.view(-1)[slots] = stored
        v_pages.view(-1)[slots] = stored.masked_fill(stored == NAN_ID, torch.nan)
        return torch.cat([self._request(batch, b, k_pages, v_pages) for b in _requests(batch)])

    def logits(self, hidden: torch.Tensor, adapters=None) -> torch.Tensor:
        broken = hidden[:, 0].isnan()
        states = hidden[:, 0].nan_to_num().to(torch.int64)
        return _logits(states, self.config.vocab_size).masked_fill(broken[:, None], torch.nan)

    def _request(self, batch: ForwardBatch, b: int, k_pages, v_pages) -> torch.Tensor:
        """Hidden states [its tokens, 1] of one request, from what its pages hold."""
        total = int(batch.seq_lens[b])
        count = int(batch.query_start[b + 1] - batch.query_start[b])
        pages = batch.page_table[b, : -(-total // k_pages.shape[1])].to(torch.int64)
        ids = k_pages[pages].flatten()[:total].to(torch.int64).tolist()
        # Like a sloppy attention kernel: what lies behind the last token is multiplied by zero.
        tail = v_pages[pages].flatten()[total:].mul(0).sum()
        broken = v_pages[pages].flatten()[:total].isnan().cumsum(0) > 0
        states, state = [], 0
        for token_id in ids:
            state = _fold(state, token_id)
            states.append(state)
        hidden = torch.tensor(states, dtype=torch.float64).masked_fill(broken, torch.nan) + tail
        return hidden[total - count :, None]


def _requests(batch: ForwardBatch) -> range:
    return range(len(batch.seq_lens))
