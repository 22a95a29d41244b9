"""What the sampler knows of one request: parameters made ready, and the tokens seen so far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from oxillama_torch.sampling.bans import BadWords
from oxillama_torch.sampling.dry import RepeatTracker
from oxillama_torch.sampling.history import TokenHistory
from oxillama_torch.sampling.params import SamplingParams

if TYPE_CHECKING:
    import torch

__all__ = ["GREEDY_BELOW", "MANY", "Processor", "SamplingRow"]

#: Dividing float32 logits by less than this leaves the likeliest token alone anyway.
GREEDY_BELOW = 1e-5

#: Putting more tokens than this in order takes long: rows that need it go by themselves.
MANY = 1024

#: (token ids so far, logits [V]) -> logits [V].
Processor = Callable[[Sequence[int], "torch.Tensor"], "torch.Tensor"]

#: Steps that change logits of single tokens; at the head of the order they come before all else.
_LOGIT_STEPS = ("penalties", "dry")

_WANTED: Mapping[str, Callable[[SamplingParams], bool]] = {
    "penalties": lambda p: (
        p.repeat_last_n != 0
        and bool(p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty)
    ),
    "dry": lambda p: p.dry_multiplier > 0 and p.dry_penalty_last_n != 0,
    "top_n_sigma": lambda p: p.top_n_sigma > 0,
    "temperature": lambda p: p.temperature != 1 or p.dynatemp_range > 0,
    "top_k": lambda p: p.top_k > 0,
    "typical_p": lambda p: p.typical_p < 1,
    "top_a": lambda p: p.top_a > 0,
    "epsilon_cutoff": lambda p: p.epsilon_cutoff > 0,
    "eta_cutoff": lambda p: p.eta_cutoff > 0,
    "top_p": lambda p: p.top_p < 1,
    "min_p": lambda p: p.min_p > 0,
    "xtc": lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5,
}


class SamplingRow:
    """One row of logits to choose from, for one request; lives as long as the request.

    Args:
        params: the request's parameters; ``seed`` is set unless it is greedy, texts among
            ``bad_words`` and ``dry_sequence_breakers`` have been made tokens.
        prompt_token_ids: the prompt.
        end_token_ids: tokens that end the request, banned until ``min_tokens``.
        processors: what ``params.processors`` names.

    Attributes:
        position: index in the request of the token to be chosen.
        generated: tokens chosen so far.
        logit_steps: penalties and DRY, as far as they are wanted and come first.
        steps: what is taken after them.
        ranks_many: more than ``MANY`` tokens have to be put in order.
        mu: where mirostat stands; ``next_mu`` is where it will stand with the token just chosen.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        end_token_ids: Iterable[int] = (),
        processors: Sequence[Processor] = (),
    ) -> None:
        self.params = params
        self.position = len(prompt_token_ids)
        self.generated = 0
        self.greedy = params.temperature < GREEDY_BELOW and params.dynatemp_range == 0
        assert self.greedy or params.seed is not None, "a row that draws needs a seed"
        self.logit_steps, self.steps = _plan(params)
        ranked = params.top_k if "top_k" in self.steps else 0
        self.ranks_many = max(ranked, params.min_keep) > MANY
        self.bias_ids = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias))
        self.bias = np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
        self.end_ids = np.array(sorted(end_token_ids) if params.min_tokens else [], np.int64)
        allowed = params.allowed_token_ids
        self.allowed_ids = None if allowed is None else np.unique(np.array(allowed, np.int64))
        self.bad_words = BadWords(params.bad_words) if params.bad_words else None
        self.processors = tuple(processors)
        self._track(prompt_token_ids)
        self.mu = 2.0 * params.mirostat_tau
        self.next_mu: float | None = None

    def _track(self, prompt_token_ids: Sequence[int]) -> None:
        """Start what looks at the tokens of the request."""
        params, steps = self.params, self.logit_steps + self.steps
        self.history: TokenHistory | None = None
        if "penalties" in steps:
            window = params.repeat_last_n
            seen = window is not None or params.repetition_penalty != 1
            self.history = TokenHistory(prompt_token_ids if seen else (), window)
        self.repeats = RepeatTracker(params, prompt_token_ids) if "dry" in steps else None
        keeps_tokens = self.bad_words is not None or self.processors
        self.token_ids = list(prompt_token_ids) if keeps_tokens else None

    @property
    def sees_tokens(self) -> bool:
        """Whether choosing depends on the tokens chosen before, beside the logits."""
        return bool(
            self.history is not None
            or self.repeats is not None
            or self.token_ids is not None
            or self.params.mirostat
        )

    def copy(self) -> SamplingRow:
        """One that goes its own way from here."""
        other = copy.copy(self)
        other.history = None if self.history is None else self.history.copy()
        other.repeats = None if self.repeats is None else self.repeats.copy()
        other.token_ids = None if self.token_ids is None else list(self.token_ids)
        return other

    def ahead(self, tokens: int) -> SamplingRow:
        """The row as it will be after some more tokens, of one that does not see them."""
        assert not tokens or not self.sees_tokens, "which tokens, would have to be known"
        other = copy.copy(self)
        other.position += tokens
        other.generated += tokens
        return other

    @property
    def must_go_on(self) -> bool:
        """Whether tokens that end the request are still banned."""
        return self.generated < self.params.min_tokens

    @property
    def chooses_alone(self) -> bool:
        """Whether every token must be asked of the sampler, even one that a grammar forces."""
        return self.bad_words is not None or self.allowed_ids is not None or bool(self.processors)

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before the steps that drop candidates."""
        return bool(
            len(self.bias_ids)
            or self.logit_steps
            or self.bad_words is not None
            or self.allowed_ids is not None
            or (len(self.end_ids) and self.must_go_on)
        )

    def banned_now(self) -> np.ndarray:
        """int64: tokens that must not come next, as far as that changes from step to step."""
        ending = self.end_ids if self.must_go_on else self.end_ids[:0]
        if self.bad_words is None:
            return ending
        return np.concatenate([ending, np.array(self.bad_words.banned(self.token_ids), np.int64)])

    def accept(self, token_id: int) -> None:
        """The token that was chosen for this row."""
        self.position += 1
        self.generated += 1
        if self.history is not None:
            self.history.add(token_id)
        if self.repeats is not None:
            self.repeats.add(token_id)
        if self.token_ids is not None:
            self.token_ids.append(token_id)
        if self.next_mu is not None:
            self.mu, self.next_mu = self.next_mu, None


def _plan(params: SamplingParams) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The steps that do something: logit changes at the head of the order, and all others."""
    wanted = [name for name in params.samplers if _WANTED[name](params)]
    if params.mirostat:
        kept = [name for name in wanted if name in _LOGIT_STEPS]
        kept += [name for name in wanted if name == "temperature"]
        wanted = [*kept, f"mirostat_{params.mirostat}"]
    head = 0
    while head < len(wanted) and wanted[head] in _LOGIT_STEPS:
        head += 1
    return tuple(wanted[:head]), tuple(wanted[head:])
