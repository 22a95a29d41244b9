"""Prompt lookup: what followed the last tokens where they stood before.

Answers repeat what they are about: code that is edited, documents that are quoted, JSON keys, a
text that has begun to go in circles. The longest stretch of tokens is looked for that ends the
request and stands earlier in it; of equally long ones, the latest. The guess is what came behind.

Work per token is bounded. As in LZ77 compressors (Deutsch 1996, RFC 1951, section 4), pairs of
tokens are found by a hash table, earlier places of the same pair by a chain, of which a fixed
number of links is followed.

Source: Saxena 2023, prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from oxillama_torch.engine.speculation.proposer import Wish

__all__ = ["LookupProposer", "TokenIndex"]

#: Links of a chain that are followed, tokens of a match that are compared.
_LINKS, _LONGEST = 16, 16
#: Tokens that one call indexes: a long prompt is taken in over several steps.
_INDEXED_AT_ONCE = 8192


class TokenIndex:
    """Finds earlier places of the last tokens of a growing list.

    Args:
        token_ids: the list; only ever appended to.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._tokens = token_ids
        # Pair of tokens -> place of its second token, the latest; and for each place the one before
        # with the same pair.
        self._latest: dict[int, int] = {}
        self._before = array("q", [-1])

    def extend(self, most: int = _INDEXED_AT_ONCE) -> bool:
        """Index the pairs that end before the last token. Returns: whether that is all of them."""
        tokens, latest, before = self._tokens, self._latest, self._before
        end = min(len(tokens) - 1, len(before) + most)
        for place in range(len(before), end):
            pair = tokens[place - 1] << 32 | tokens[place]
            before.append(latest.get(pair, -1))
            latest[pair] = place
        return end >= len(tokens) - 1

    def find(self) -> int | None:
        """Where the longest match ends, see the module; None where the last pair is new."""
        tokens, last = self._tokens, len(self._tokens) - 1
        if last < 1:
            return None
        place = self._latest.get(tokens[last - 1] << 32 | tokens[last], -1)
        best, longest = None, 0
        for _ in range(_LINKS):
            if place < 0:
                break
            length = self._matching(place, last)
            if length > longest:
                best, longest = place, length
            place = self._before[place]
        return best

    def _matching(self, place: int, last: int) -> int:
        """How many tokens that end at ``place`` are those that end at ``last``."""
        tokens, length = self._tokens, 2
        most = min(place + 1, _LONGEST)
        while length < most and tokens[place - length] == tokens[last - length]:
            length += 1
        return length


class LookupProposer:
    """Guesses by prompt lookup."""

    def propose(self, wishes: Sequence[Wish]) -> list[Sequence[int]]:
        return [self._guess(wish) for wish in wishes]

    def _guess(self, wish: Wish) -> Sequence[int]:
        state = wish.state
        if state.guessing.notes is None:
            state.guessing.notes = TokenIndex(state.token_ids)
        index: TokenIndex = state.guessing.notes
        if not index.extend() or (place := index.find()) is None:
            return ()
        known = state.token_ids
        guess = known[place + 1 : place + 1 + wish.most]
        # A match that reaches to the end is a repetition: it goes on repeating.
        period = len(known) - 1 - place
        while len(guess) < wish.most:
            guess.append(guess[-period])
        return guess
