"""What a model says about given tokens without generating any: logits, scores, embeddings.

N texts, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from oxillama_torch.completion import Collector, Score
from oxillama_torch.engine.request import Capture, GenerationRequest, Pooling, PromptEvent
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Scoring"]

_NO_TOKENS = SamplingParams(max_tokens=0, temperature=0)

Pairs = tuple[tuple[str, float], ...]


class Scoring:
    """Requests that generate nothing.

    Args:
        engine: the batching thread.
        tokenizer: the model's.
    """

    def __init__(self, engine: EngineThread, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer

    def logits(self, ids: Sequence[int], adapters: Pairs) -> torch.Tensor:
        """Logits after each token.

        Returns: float32 [T, V] on the CPU.
        """
        [event] = self._captured([ids], "logits", adapters)
        return torch.from_numpy(event.captured)

    def score(self, ids: Sequence[int]) -> Score:
        """Log-probability of each token given those before it."""
        request = GenerationRequest(
            prompt_token_ids=tuple(ids), params=replace(_NO_TOKENS, prompt_logprobs=0)
        )
        [event] = Collector(self._engine, self._tokenizer).prompts([request])
        logprobs = [None if entry is None else entry.logprob for entry in event.logprobs]
        return Score(list(ids), logprobs, sum(logprobs[1:]))

    def embed(
        self, prompts: Sequence[Sequence[int]], pooling: str, normalize: bool
    ) -> torch.Tensor:
        """Hidden states after the final norm, pooled over each prompt's tokens.

        Returns: float32 [N, D] on the CPU.
        """
        if pooling not in get_args(Pooling):
            raise UnsupportedError(f"pooling {pooling!r}", get_args(Pooling))
        events = self._captured(prompts, "hidden", (), pooling)
        none = torch.empty(0, self._engine.hidden_size)
        embeddings = torch.cat([none, *(torch.from_numpy(event.captured) for event in events)])
        return torch.nn.functional.normalize(embeddings, dim=-1) if normalize else embeddings

    def _captured(
        self,
        prompts: Sequence[Sequence[int]],
        what: Capture,
        adapters: Pairs,
        pooling: Pooling | None = None,
    ) -> list[PromptEvent]:
        requests = [
            GenerationRequest(
                prompt_token_ids=tuple(ids),
                params=_NO_TOKENS,
                capture=what,
                pooling=pooling,
                adapters=adapters,
            )
            for ids in prompts
        ]
        return Collector(self._engine, self._tokenizer).prompts(requests)
