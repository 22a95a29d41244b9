"""Looking for likelier answers: the best of several, and beam search.

Both are made of ordinary engine requests. Each step of a beam search asks for one token after each
running beam; the prefix cache shares the pages of what the beams have in common, so a step computes
a page's worth of tokens per beam at most, and nothing but those tokens is ever held twice.

Scores are sums of raw log-probabilities:

    score of a beam = sum of logprobs / length ** length_penalty
    best of n: mean logprob per token

Source: the rules for keeping, finishing and stopping are those of transformers' beam search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from oxillama_torch.completion import Collector, Completion, requests_for
from oxillama_torch.engine.request import GenerationRequest
from oxillama_torch.engine.thread import EngineThread
from oxillama_torch.errors import EngineError, RequestError
from oxillama_torch.sampling.params import SamplingParams, TokenLogprobs
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["Beam", "BeamSearch", "EarlyStopping", "begin", "best_of", "mean_logprob", "search"]

EarlyStopping = bool | Literal["never"]

#: Most alternatives that a request may ask for.
_MAX_ALTERNATIVES = 1024
_MAX_WIDTH = 64
#: The longest text to this power is still a number.
_MAX_PENALTY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """One continuation found by beam search.

    Args:
        token_ids: its tokens, an end-of-generation token included.
        logprob: sum of the tokens' log-probabilities.
        score: ``logprob / len(token_ids) ** length_penalty``.
        finish_reason: ``stop`` or ``length``.
        logprobs: one per token, with the alternatives that the search saw.
        text: without special tokens; empty until somebody decodes it.
    """

    token_ids: tuple[int, ...]
    logprob: float
    logprobs: tuple[TokenLogprobs, ...] = ()
    score: float = float("-inf")
    finish_reason: str = "length"
    text: str = ""


class BeamSearch:
    """The beams of one prompt. Knows no engine: ask for ``requests``, hand in what they brought.

    Args:
        prompt: token ids.
        width: beams that run at once, and that are found.
        max_tokens: most tokens of a beam.
        length_penalty: above 0 favours long beams, below 0 short ones.
        early_stopping: True: stop once ``width`` beams have ended; False: when no running beam
            would do better if it ended now; ``never``: when none can do better any more.
        end_ids: tokens that end a beam.
        banned_ids: tokens that no beam takes.
        adapters: (name, scale) pairs.

    Raises:
        RequestError: a width, length or penalty that cannot be.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        width: int,
        max_tokens: int,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        end_ids: frozenset[int] = frozenset(),
        banned_ids: frozenset[int] = frozenset(),
        adapters: tuple[tuple[str, float], ...] = (),
    ) -> None:
        if not 1 <= width <= _MAX_WIDTH:
            raise RequestError(f"a beam search is 1 to {_MAX_WIDTH} wide", param="n")
        if max_tokens < 1:
            raise RequestError("a beam has at least one token", param="max_tokens")
        if not -_MAX_PENALTY <= length_penalty <= _MAX_PENALTY:
            raise RequestError(
                f"length_penalty is between {-_MAX_PENALTY} and {_MAX_PENALTY}",
                param="length_penalty",
            )
        self.prompt, self._adapters = tuple(prompt), adapters
        self._width, self._max_tokens = width, max_tokens
        self._penalty, self._early = length_penalty, early_stopping
        self._end_ids, self._banned = end_ids, banned_ids
        # Enough for as many beams to go on even if every end token is among the likeliest.
        self._kept = max(2, 1 + len(end_ids)) * width
        self._running = [Beam(token_ids=(), logprob=0.0)]
        self._finished: list[Beam] = []
        self.done = False
        if self._kept + len(banned_ids) > _MAX_ALTERNATIVES:
            raise RequestError("the beams are too many for this model's end tokens", param="n")

    def requests(self) -> list[GenerationRequest]:
        """One request per running beam, for one token and its likeliest alternatives."""
        params = SamplingParams(
            max_tokens=1, temperature=0, logprobs=self._kept + len(self._banned), seed=0
        )
        return [
            GenerationRequest(
                prompt_token_ids=self.prompt + beam.token_ids,
                params=params,
                adapters=self._adapters,
            )
            for beam in self._running
        ]

    def advance(self, found: Sequence[TokenLogprobs]) -> None:
        """Take a step.

        Args:
            found: what came of each of ``requests``.
        """
        candidates = [
            _longer(beam, entry, rank)
            for beam, entry in zip(self._running, found)
            for rank, (token_id, _) in enumerate(entry.top, 1)
            if token_id not in self._banned
        ]
        # Equal sums: the beam that was ahead, then the likelier token; sort is stable.
        candidates.sort(key=lambda beam: -beam.logprob)
        candidates = candidates[: self._kept]
        length = len(candidates[0].token_ids)
        at_end = length >= self._max_tokens
        ended = [at_end or beam.token_ids[-1] in self._end_ids for beam in candidates]
        full = len(self._finished) == self._width
        if not (full and self._early is True):
            # Only the best may end: the others are there to go on in their place.
            for beam, has_ended in list(zip(candidates, ended))[: self._width]:
                if has_ended:
                    self._finish(beam, length)
        self._running = [beam for beam, e in zip(candidates, ended) if not e][: self._width]
        self.done = at_end or not self._running or not self._can_improve(length)

    def best(self) -> list[Beam]:
        """The beams that have ended, the best first."""
        return list(self._finished)

    def _finish(self, beam: Beam, length: int) -> None:
        ended = beam.token_ids[-1] in self._end_ids
        score = beam.logprob / length**self._penalty
        beam = replace(beam, score=score, finish_reason="stop" if ended else "length")
        self._finished = sorted([*self._finished, beam], key=lambda b: -b.score)[: self._width]

    def _can_improve(self, length: int) -> bool:
        if len(self._finished) < self._width:
            return True
        if self._early is True:
            return False
        longest = self._max_tokens if self._early == "never" and self._penalty > 0 else length
        return self._running[0].logprob / longest**self._penalty > self._finished[-1].score


def _longer(beam: Beam, entry: TokenLogprobs, rank: int) -> Beam:
    """A beam with the token of this rank behind it."""
    token_id, logprob = entry.top[rank - 1]
    entry = replace(entry, token_id=token_id, logprob=logprob, rank=rank)
    return Beam(
        token_ids=(*beam.token_ids, token_id),
        logprob=beam.logprob + logprob,
        logprobs=(*beam.logprobs, entry),
    )


def begin(
    prompt: Sequence[int], engine: EngineThread, tokenizer: Tokenizer, **options: Any
) -> BeamSearch:
    """The search for one prompt with a model's end tokens, within its context."""
    room = max(engine.max_context - len(prompt), 1)
    options["max_tokens"] = min(options["max_tokens"], room)
    return BeamSearch(
        prompt,
        end_ids=tokenizer.eos_ids,
        banned_ids=frozenset(tokenizer.suppressed_ids),
        **options,
    )


def search(
    searches: Sequence[BeamSearch], engine: EngineThread, tokenizer: Tokenizer
) -> list[list[Beam]]:
    """Run searches to their ends, all in one batch as far as there is room.

    Returns: for each, its beams with their texts, the best first.
    """
    while open_searches := [search for search in searches if not search.done]:
        requests = [search.requests() for search in open_searches]
        flat = [request for group in requests for request in group]
        tokens = Collector(engine, tokenizer).completions(flat)
        if not all(token.logprobs for token in tokens):
            raise EngineError("the engine has been stopped")
        found = iter(tokens)
        for open_search, group in zip(open_searches, requests):
            open_search.advance([next(found).logprobs[0] for _ in group])
    return [
        [
            replace(beam, text=tokenizer.decode(beam.token_ids, skip_special=True))
            for beam in search.best()
        ]
        for search in searches
    ]


def best_of(
    collector: Collector,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    adapters: tuple[tuple[str, float], ...],
    count: int,
) -> list[Completion]:
    """Make ``count`` completions of each prompt.

    Returns: the ``n`` of each prompt with the highest mean log-probability, the best first.

    Raises:
        RequestError: ``count`` is below ``n``.
    """
    if count < params.n:
        raise RequestError("best_of must not be below n", param="best_of")
    made = replace(params, n=count, logprobs=params.logprobs or 0)
    done = collector.completions(
        [request for prompt in prompts for request in requests_for(prompt, made, adapters)]
    )
    best = []
    for start in range(0, len(done), count):
        ranked = sorted(done[start : start + count], key=lambda c: -mean_logprob(c.logprobs))
        best += ranked[: params.n]
    return best if params.logprobs is not None else [replace(c, logprobs=None) for c in best]


def mean_logprob(entries: Sequence[TokenLogprobs]) -> float:
    """Log-probability per token; minus infinity where there is none."""
    return sum(e.logprob for e in entries) / len(entries) if entries else float("-inf")
