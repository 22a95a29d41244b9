"""How many guesses a request gets: as many as its last ones were worth.

After a step with k guesses of which a were right, the next one gets

    min(most, 2 k)   if all of them were right
    a + 1            otherwise

and, where none was right for the m-th time in a row, a pause of ``2**m - 2`` steps comes before
it. Where guessing does not pay, it soon happens once in ``_LONGEST_PAUSE`` tokens. Nothing here
depends on the clock: with fast numerics too, a run can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Guessing", "Pace"]

_FIRST = 4
_LONGEST_PAUSE = 64


class Pace:
    """The number of guesses that one request gets.

    Args:
        most: never more than this.
    """

    __slots__ = ("_most", "_paused", "_wrong_in_a_row", "limit")

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = min(most, _FIRST)
        self._wrong_in_a_row = self._paused = 0

    def turn(self) -> int:
        """How many guesses the next step may bring; counts the step."""
        if self._paused:
            self._paused -= 1
            return 0
        return self.limit

    def learn(self, guesses: int, right: int) -> None:
        """Take in how a step with guesses has ended."""
        if right:
            self._wrong_in_a_row = 0
            grown = 2 * self.limit if right == guesses else right + 1
            self.limit = min(self._most, max(grown, 1))
            return
        self._wrong_in_a_row += 1
        self._paused = min(2**self._wrong_in_a_row - 2, _LONGEST_PAUSE)
        self.limit = 1


@dataclass(slots=True)
class Guessing:
    """What speculation keeps about one request.

    Args:
        pace: how many guesses it gets.
        notes: the proposer's own, None at first.
    """

    pace: Pace
    notes: Any = field(default=None)
