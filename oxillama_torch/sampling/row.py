"""What the sampler knows of one request: parameters made ready, and the tokens seen so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from oxillama_torch.sampling.params import SamplingParams

__all__ = ["GREEDY_BELOW", "SamplingRow", "TokenHistory"]

#: Dividing float32 logits by less than this leaves the likeliest token alone anyway.
GREEDY_BELOW = 1e-5

_FIRST_CAPACITY = 64


class TokenHistory:
    """Distinct tokens of a request and how often each was generated, as growing arrays."""

    def __init__(self, prompt_token_ids: Iterable[int] = ()) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.zeros(_FIRST_CAPACITY, np.int64)
        self._counts = np.zeros(_FIRST_CAPACITY, np.int64)
        for token_id in prompt_token_ids:
            self._slot(token_id)

    @property
    def ids(self) -> np.ndarray:
        """int64 [distinct tokens]."""
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> np.ndarray:
        """int64 [distinct tokens]: occurrences in the output; 0 for tokens of the prompt only."""
        return self._counts[: len(self._index)]

    def add(self, token_id: int) -> None:
        """Count one generated token."""
        slot = self._slot(token_id)  # may replace the arrays
        self._counts[slot] += 1

    def _slot(self, token_id: int) -> int:
        slot = self._index.setdefault(token_id, len(self._index))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token_id
        return slot


class SamplingRow:
    """One row of logits to choose from, for one request; lives as long as the request.

    Args:
        params: the request's parameters; ``seed`` is set unless it is greedy.
        prompt_token_ids: the prompt (for the repetition penalty).
        end_token_ids: tokens that end the request, banned until ``min_tokens``.

    Attributes:
        position: index in the request of the token to be chosen.
        generated: tokens chosen so far.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        end_token_ids: Iterable[int] = (),
    ) -> None:
        self.params = params
        self.position = len(prompt_token_ids)
        self.generated = 0
        self.greedy = params.temperature < GREEDY_BELOW
        assert self.greedy or params.seed is not None, "a row that draws needs a seed"
        self.filtered = not self.greedy and (params.top_k > 0 or params.top_p < 1)
        self.bias_ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        self.bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self.end_ids = np.array(sorted(end_token_ids) if params.min_tokens else [], np.int64)
        repeats = params.repetition_penalty != 1
        self.history: TokenHistory | None = None
        if repeats or params.presence_penalty or params.frequency_penalty:
            self.history = TokenHistory(prompt_token_ids if repeats else ())

    @property
    def must_go_on(self) -> bool:
        """Whether tokens that end the request are still banned."""
        return self.generated < self.params.min_tokens

    def accept(self, token_id: int) -> None:
        """The token that was chosen for this row."""
        self.position += 1
        self.generated += 1
        if self.history is not None:
            self.history.add(token_id)
