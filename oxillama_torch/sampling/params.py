"""How one request wants its tokens chosen. Plain data, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, get_args

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint

__all__ = ["DEFAULT_SAMPLERS", "SAMPLERS", "LogprobsMode", "SamplingParams", "TokenLogprobs"]

MAX_SEED = 2**63 - 1

#: The steps of the chain that can be ordered, in the order taken by default.
DEFAULT_SAMPLERS = (
    "penalties",
    "dry",
    "top_n_sigma",
    "temperature",
    "top_k",
    "typical_p",
    "top_a",
    "epsilon_cutoff",
    "eta_cutoff",
    "top_p",
    "min_p",
    "xtc",
)
SAMPLERS = frozenset(DEFAULT_SAMPLERS)

#: What stops DRY from seeing a repetition across it, as llama.cpp has it.
DRY_BREAKERS = ("\n", ":", '"', "*")

LogprobsMode = Literal["raw", "masked"]

_MAX_WORDS = 256
_MAX_WORD_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural log; see ``SamplingParams.logprobs_mode``.

    Args:
        token_id: the token that stands there.
        logprob: its log-probability.
        rank: 1 for the likeliest token.
        top: (token id, logprob) pairs of possible tokens, likeliest first; ties by lower id.
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
        logprobs_mode: whose log-probabilities ``logprobs`` reports: ``raw``, the model's own, or
            ``masked``, those of what custom processors and the constraint leave of them.
        repeat_last_n: with a number, the three penalties count the last n tokens, prompt and output
            alike, as llama.cpp has it (0: they are off); ``None``: repetition looks at all tokens,
            presence and frequency at the output, as vLLM and OpenAI have it.
        dry_multiplier: 0 is off; else a token that would make a repetition of n tokens longer loses
            ``multiplier * base ** (n - allowed_length)``, if n is at least ``allowed_length``.
        dry_base, dry_allowed_length: see above.
        dry_penalty_last_n: tokens looked at; -1: all, 0: DRY is off.
        dry_sequence_breakers: texts (or token sequences) that no repetition reaches across.
        top_n_sigma: drop logits more than n standard deviations below the highest; 0 or less: off.
        typical_p: keep the tokens whose surprise is nearest to its expectation until their
            probability reaches p; 1 keeps all.
        top_a: drop tokens below ``top_a`` times the square of the highest probability.
        epsilon_cutoff: drop tokens below this probability.
        eta_cutoff: drop tokens below ``min(eta, sqrt(eta) * exp(-entropy))``.
        xtc_probability, xtc_threshold: with this probability, drop all but the least likely of the
            tokens that reach the threshold.
        dynatemp_range, dynatemp_exponent: temperature between ``temperature - range`` and
            ``temperature + range``, by the normalised entropy to the power of the exponent.
        mirostat: 1 or 2: keep the surprise of the output near ``mirostat_tau`` bits, in place of
            all steps that drop tokens; 0 is off.
        mirostat_tau, mirostat_eta: target and learning rate.
        min_keep: typical_p, the cutoffs, top_p, min_p and xtc leave at least this many tokens.
        bad_words: texts (or token sequences) that are not to be completed.
        allowed_token_ids: only these may be chosen; ``None``: all.
        samplers: the steps that are taken, in this order; a step that is not named is not taken.
        processors: names of registered functions that change the logits before all else.
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
    logprobs_mode: LogprobsMode = "raw"
    repeat_last_n: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str | tuple[int, ...], ...] = DRY_BREAKERS
    top_n_sigma: float = -1.0
    typical_p: float = 1.0
    top_a: float = 0.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    min_keep: int = 0
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS
    processors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "dry_sequence_breakers", "processors"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for name in _TUPLES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(map(_plain, value)))
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None:
                _range(name, value, low, high)
                if name in _WHOLE and not isinstance(value, Integral):
                    raise RequestError(f"{name} must be a whole number, got {value}", param=name)
        _check_words("stop", self.stop)
        _check_words("bad_words", self.bad_words)
        _check_words("dry_sequence_breakers", self.dry_sequence_breakers)
        _check_order(self.samplers)
        if self.logprobs_mode not in get_args(LogprobsMode):
            raise RequestError("logprobs_mode is raw or masked", param="logprobs_mode")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids leaves no token", param="allowed_token_ids")
        for token_id, bias in self.logit_bias.items():
            if not (bias == -math.inf or abs(bias) <= _FLOAT32_MAX):
                raise RequestError(
                    "logit_bias must be finite or -inf", param=f"logit_bias.{token_id}"
                )


_FLOAT32_MAX = 3.4028234663852886e38

_TUPLES = (
    "stop",
    "stop_token_ids",
    "bad_words",
    "dry_sequence_breakers",
    "allowed_token_ids",
    "samplers",
    "processors",
)

_RANGES = {
    "max_tokens": (0, 2**31),
    "temperature": (0, 100),
    "top_k": (0, 2**31),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "seed": (-MAX_SEED, MAX_SEED),
    "min_tokens": (0, 2**31),
    "logprobs": (0, 1024),
    "prompt_logprobs": (0, 1024),
    "n": (1, 128),
    "repeat_last_n": (0, 2**31),
    "dry_multiplier": (0, 1000),
    "dry_base": (1, 1000),
    "dry_allowed_length": (0, 2**31),
    "dry_penalty_last_n": (-1, 2**31),
    "top_n_sigma": (-1, 1000),
    "typical_p": (0, 1),
    "top_a": (0, 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 1),
    "dynatemp_range": (0, 100),
    "dynatemp_exponent": (0, 100),
    "mirostat": (0, 2),
    "mirostat_tau": (0, 100),
    "mirostat_eta": (0, 100),
    "min_keep": (0, 2**31),
}


_WHOLE = frozenset(
    {
        *("max_tokens", "min_tokens", "n", "seed", "logprobs", "prompt_logprobs", "top_k"),
        *("min_keep", "mirostat", "repeat_last_n", "dry_allowed_length", "dry_penalty_last_n"),
    }
)


def _plain(value: object) -> object:
    """Lists inside a list become tuples: parameters can be compared and kept in sets."""
    return tuple(value) if isinstance(value, list) else value


def _check_words(name: str, words: tuple[str | tuple[int, ...], ...]) -> None:
    # First of all: to look at every character of megabytes would hold up everybody.
    texts = [word for word in words if isinstance(word, str)]
    if len(texts) > _MAX_WORDS or any(len(text) > _MAX_WORD_LENGTH for text in texts):
        longest = max(map(len, texts))
        raise RequestError(
            f"{name}: at most {_MAX_WORDS} texts of {_MAX_WORD_LENGTH} characters, "
            f"got {len(texts)}, the longest of {longest}",
            param=name,
        )
    for word in words:
        ids = word if isinstance(word, tuple) else ()
        if not isinstance(word, str | tuple) or not all(isinstance(i, str | Integral) for i in ids):
            raise RequestError(f"{name} takes texts, got {word!r}", param=name)
        if not word:
            raise RequestError(f"{name} strings must not be empty", param=name)


def _check_order(samplers: tuple[str, ...]) -> None:
    for name in samplers:
        if name not in SAMPLERS:
            known = ", ".join(DEFAULT_SAMPLERS)
            raise RequestError(f"unknown sampler {name!r}; known: {known}", param="samplers")
    if len(set(samplers)) < len(samplers):
        raise RequestError("a sampler is named twice", param="samplers")


def _range(name: str, value: float, low: float, high: float) -> None:
    """Refuse NaN too: every comparison with it is false."""
    if not low <= value <= high:
        raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
