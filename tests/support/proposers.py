"""Proposers whose guesses are right as far as a test says, and a way to put them into an engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.speculation.proposer import Proposer, Wish
from oxillama_torch.engine.speculation.speculator import Speculator

__all__ = ["Prophet", "speculate"]


class Prophet:
    """Knows what requests will say, and tells the truth now and then.

    Args:
        future: prompt -> tokens that will come.
        right: called per guess; how many tokens of it are right before the first wrong one.
        wrong: what stands in for the others, in turn.
    """

    def __init__(
        self,
        future: Callable[[tuple[int, ...]], Sequence[int]],
        right: Callable[[], int] = lambda: 10**6,
        wrong: Sequence[int] = (2,),
    ) -> None:
        self._future, self._right, self._wrong = future, right, wrong
        self.told = 0

    def propose(self, wishes: Sequence[Wish]) -> list[Sequence[int]]:
        return [self._guess(wish) for wish in wishes]

    def _guess(self, wish: Wish) -> list[int]:
        state = wish.state
        coming = list(self._future(state.request.prompt_token_ids))[state.generated :]
        right = self._right()
        guess = coming[: min(right, wish.most)]
        while len(guess) < wish.most:
            self.told += 1
            guess.append(self._wrong[self.told % len(self._wrong)])
        return guess


def speculate(engine: Engine, proposer: Proposer, *, most: int = 4) -> Engine:
    """The engine with this proposer in place of its own."""
    engine._steps.speculator = Speculator(
        proposer,
        engine._scheduler.pages,
        max_batch_tokens=engine._scheduler.max_batch_tokens,
        most=most,
        counters=engine._counters,
    )
    return engine
