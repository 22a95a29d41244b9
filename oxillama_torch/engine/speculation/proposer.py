"""What makes guesses: the one interface behind which prompt lookup and draft models stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from oxillama_torch.engine.state import RequestState

__all__ = ["Proposer", "Wish"]


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that could use guesses.

    Args:
        state: the request; ``state.held`` has pages for its tokens and for ``most`` more.
        most: guesses it can take, at least 1.
    """

    state: RequestState
    most: int


class Proposer(Protocol):
    """Guesses how requests go on. A guess may be wrong: it costs time, never changes a token.

    Whatever it wants to remember of a request it keeps in ``state.guessing.notes``, which goes with
    the request; ``state.token_ids`` only ever grows.
    """

    def propose(self, wishes: Sequence[Wish]) -> list[Sequence[int]]:
        """Guesses for each wish: the tokens behind ``state.token_ids``, at most as many as wished
        for, none where there is no idea."""
        ...
