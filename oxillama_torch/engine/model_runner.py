"""Runs the decoder on a scheduled step and brings back tokens and prompt outputs.

Shapes: T tokens of the step, R rows whose outputs are wanted, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from oxillama_torch.engine.batch import BatchBuilder, StepInputs
from oxillama_torch.engine.device_sampling import is_served, sample_on_device, wanted_on
from oxillama_torch.engine.prefill_graphs import PrefillGraphs
from oxillama_torch.engine.speculation.walk import Walk, walk_along
from oxillama_torch.engine.state import RequestState, ScheduledBatch, ScheduledItem
from oxillama_torch.errors import EngineError, OxiLlamaError
from oxillama_torch.kvcache.host_pages import HostPages
from oxillama_torch.kvcache.pool import KVPool
from oxillama_torch.layers.attention import ForwardBatch
from oxillama_torch.layers.lora import AdapterBatch
from oxillama_torch.models.config import ModelConfig
from oxillama_torch.sampling.logprobs import token_logprobs
from oxillama_torch.sampling.mask import MaskFiller, Masks
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.sampling.row import SamplingRow
from oxillama_torch.sampling.sampler import Sampled, finite_rows, sample

__all__ = ["ItemResult", "Model", "ModelRunner"]

#: Elements of the [rows, V] logits of prompt positions computed at once: bounds their memory.
_MAX_LOGITS = 1 << 24


class Model(Protocol):
    """What the engine needs of ``models.decoder.Decoder``."""

    config: ModelConfig
    numerics: str
    dtype: torch.dtype
    device: torch.device

    def __call__(self, batch: ForwardBatch, kv: list) -> torch.Tensor: ...
    def logits(
        self, hidden: torch.Tensor, adapters: AdapterBatch | None = None
    ) -> torch.Tensor: ...
    def kv_shapes(self) -> list[tuple[int, int, int]]: ...


@dataclass(slots=True)
class ItemResult:
    """What a step brought for one request; with ``error``, nothing else counts.

    Where some request of the step had guesses, ``walk`` has the tokens.
    """

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    captured: list[np.ndarray] = field(default_factory=list)
    error: OxiLlamaError | None = None
    walk: Walk | None = None


class ModelRunner:
    """The decoder with its KV pool.

    Args:
        model: the decoder.
        pool: keys and values.
        builder: makes the step's tensors.
        banned_ids: tokens that are never chosen.
        host: where pages of preempted requests go; None: nowhere.
        prefill: computes steps of one short prompt; None: as all others.

    Attributes:
        sampled_by: tokens chosen by the ``sample`` op and by the chain.
    """

    def __init__(
        self,
        model: Model,
        pool: KVPool,
        builder: BatchBuilder,
        banned_ids: frozenset[int] = frozenset(),
        host: HostPages | None = None,
        prefill: PrefillGraphs | None = None,
    ) -> None:
        self._prefill = prefill
        self._model, self._pool, self._builder, self._host = model, pool, builder, host
        self._masks = MaskFiller(model.config.vocab_size, model.device)
        self._banned = torch.tensor(sorted(banned_ids), device=model.device) if banned_ids else None
        self.sampled_by = {"op": 0, "chain": 0}

    def run(self, batch: ScheduledBatch) -> dict[RequestState, ItemResult]:
        """Compute one step. Repeating it with fewer items is harmless: it writes the same again."""
        walks = []
        if any(item.guesses for item in batch.items):
            walks = [Walk(item) for item in batch.items if item.samples]
            masks = self._masks.start([w.matcher for w in walks for _ in range(w.first_rows)])
        else:
            masks = self._masks.start([item.state.matcher for item in batch.items if item.samples])
        try:
            inputs = self._builder.build(batch)
            hidden = self._forward(inputs.forward)
        finally:
            if masks is not None:
                masks.wait()
        results = {item.state: ItemResult() for item in batch.items}
        rows = hidden.index_select(0, inputs.forward.logits_rows)
        if walks:
            self._walk(walks, inputs, rows, results, masks)
        else:
            self._sample(inputs, rows, results, masks)
        offset = sum(1 + len(item.guesses) for item in inputs.sampling)
        for item in inputs.scoring:
            count = len(item.scored_positions)
            self._score(item, rows[offset : offset + count], results[item.state])
            offset += count
        return results

    def _forward(self, batch: ForwardBatch) -> torch.Tensor:
        if self._prefill is not None and self._prefill.serves(batch):
            return self._prefill.forward(batch)
        return self._model(batch, self._pool.layers)

    def swap(self, batch: ScheduledBatch) -> None:
        """Copy pages as a step wants them, once and before it is run."""
        for copy in batch.swap_out:
            self._host.save(copy)
        for copy in batch.swap_in:
            self._host.restore(copy)

    def clear(self, pages: list[int]) -> None:
        """Zero pages whose content may be NaN."""
        self._pool.clear(pages)

    def _sample(
        self,
        inputs: StepInputs,
        rows: torch.Tensor,
        results: dict[RequestState, ItemResult],
        masks: Masks | None,
    ) -> None:
        if not inputs.sampling:
            return
        count = len(inputs.sampling)
        adapters = self._builder.head_adapters(inputs.sampling, [1] * count)
        logits = self._model.logits(rows[:count], adapters)
        sampled = self._choose(logits, [item.state.row for item in inputs.sampling], masks)
        for item, out in zip(inputs.sampling, sampled):
            result = results[item.state]
            result.token_id, result.logprobs, result.error = out.token_id, out.logprobs, out.error

    def _choose(
        self, logits: torch.Tensor, rows: list[SamplingRow], masks: Masks | None
    ) -> list[Sampled]:
        """One token per row, by the op or by the chain."""
        if wanted_on(logits.device) and all(map(is_served, rows)):
            self.sampled_by["op"] += len(rows)
            return sample_on_device(logits, rows, self._banned, masks, self._model.numerics)
        self.sampled_by["chain"] += len(rows)
        return sample(logits, rows, self._banned, masks)

    def _walk(
        self,
        walks: list[Walk],
        inputs: StepInputs,
        rows: torch.Tensor,
        results: dict[RequestState, ItemResult],
        masks: Masks | None,
    ) -> None:
        """As ``_sample``, along the guesses of the requests that have some."""
        counts = [walk.rows for walk in walks]
        adapters = self._builder.head_adapters(inputs.sampling, counts)
        logits = self._model.logits(rows[: sum(counts)], adapters)
        walk_along(walks, logits, masks, choose=self._choose, start_masks=self._masks.start)
        for walk in walks:
            result = results[walk.item.state]
            result.walk, result.error = walk, walk.error
        # Behind a wrong guess, NaN would stay in the pages until a right token takes the place.
        wrong = torch.tensor([is_wrong for walk in walks for is_wrong in walk.wrong()])
        broken = wrong.to(logits.device) & ~finite_rows(logits)
        if bool(broken.any()):
            forward = inputs.forward
            self._pool.clear_slots(forward.slot_mapping[forward.logits_rows[: len(broken)][broken]])

    def _score(self, item: ScheduledItem, hidden: torch.Tensor, result: ItemResult) -> None:
        """Outputs of the prompt positions of ``item``, whose hidden rows [R, D] are given."""
        state = item.state
        params, positions = state.request.params, item.scored_positions
        if not bool(finite_rows(hidden).all()):
            result.error = EngineError("the model's hidden states are not finite")
            return
        if state.capture == "hidden":
            result.captured.append(hidden.float().cpu().numpy())
        if state.capture != "logits" and params.prompt_logprobs is None:
            return
        step = max(1, _MAX_LOGITS // self._model.config.vocab_size)
        for start in range(0, len(positions), step):
            part = hidden[start : start + step]
            logits = self._model.logits(part, self._builder.head_adapters([item], [len(part)]))
            if state.capture == "logits":
                result.captured.append(logits.cpu().numpy())
            if params.prompt_logprobs is not None:
                # The row of position i speaks about the token at i + 1; the last has none.
                first = positions[start] + 1
                stop = min(first + len(logits), state.prompt_tokens)
                result.prompt_logprobs += token_logprobs(
                    logits[: stop - first], state.token_ids[first:stop], params.prompt_logprobs
                )
