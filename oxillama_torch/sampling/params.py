"""How one request wants its tokens chosen. Plain data, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint

__all__ = ["SamplingParams", "TokenLogprobs"]

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural log, of the raw (unprocessed) distribution.

    Args:
        token_id: the token that stands there.
        logprob: its log-probability.
        rank: 1 for the likeliest token.
        top: (token id, logprob) pairs, likeliest first; ties by lower id.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, named as OpenAI and llama.cpp name them.

    Args:
        max_tokens: most tokens to generate; ``None`` means up to the context's end.
        temperature: 0 means greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p; 1 keeps all.
        min_p: drop tokens below ``min_p`` times the likeliest one's probability; 0 keeps all.
        repetition_penalty: divides (positive) or multiplies (negative) logits of tokens seen in
            prompt and output; 1 is off.
        presence_penalty, frequency_penalty: subtracted from logits of tokens generated so far,
            once or per occurrence (OpenAI's definition).
        logit_bias: token id -> value added to its logit before anything else.
        seed: draws depend on (seed, position) alone; ``None`` lets the front door choose one.
        stop: strings that end the text (not part of it).
        stop_token_ids: ids that end the text, besides the model's end-of-generation set.
        ignore_eos: do not stop at the model's end-of-generation tokens.
        min_tokens: end-of-generation and stop ids are banned before this many tokens.
        logprobs: number of top alternatives reported per generated token; ``None``: no logprobs;
            0: the chosen token's only.
        prompt_logprobs: the same for every prompt token.
        n: number of independent completions.
        constraint: what the output must look like; None: anything.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _range("temperature", self.temperature, 0, 100)
        _range("top_p", self.top_p, 0, 1)
        _range("min_p", self.min_p, 0, 1)
        _range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        _range("presence_penalty", self.presence_penalty, -100, 100)
        _range("frequency_penalty", self.frequency_penalty, -100, 100)
        _range("top_k", self.top_k, 0, 2**31)
        _range("min_tokens", self.min_tokens, 0, 2**31)
        _range("n", self.n, 1, 128)
        if self.max_tokens is not None:
            _range("max_tokens", self.max_tokens, 0, 2**31)
        if self.seed is not None:
            _range("seed", self.seed, -MAX_SEED, MAX_SEED)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _range(name, getattr(self, name), 0, 1024)
        if any(not text for text in self.stop):
            raise RequestError("stop strings must not be empty", param="stop")
        for token_id, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                raise RequestError(
                    "logit_bias must be finite or -inf", param=f"logit_bias.{token_id}"
                )


def _range(name: str, value: float, low: float, high: float) -> None:
    """Refuse NaN too: every comparison with it is false."""
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
