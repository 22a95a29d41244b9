"""What the engine counts, for ``/health``, ``/metrics`` and people."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counters"]


@dataclass(slots=True)
class Counters:
    """Totals since the start, written by the batching thread and read by any other.

    Args:
        steps: steps computed;  step_seconds: time spent in them;  last_step_seconds: the latest.
        prompt_tokens: tokens computed that were not chosen one by one, recomputed ones included.
        generated_tokens: tokens handed out.
        finished, cancelled, failed: requests by their end; past their deadline counts as cancelled.
        step_failures: steps whose batched computation raised.
        proposed_tokens, accepted_tokens: guesses that were made, and those that were right.
        speculated_items: checks of a request's guesses: a step each, of one request.
        proposer_failures: steps that went without guesses because making them raised.
    """

    steps: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    step_failures: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    speculated_items: int = 0
    proposer_failures: int = 0
