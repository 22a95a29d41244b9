"""Prompt lookup against a search through the whole list."""

from __future__ import annotations

from types import SimpleNamespace

import hypothesis.strategies as st
from hypothesis import given

from oxillama_torch.engine.speculation.lookup import LookupProposer, TokenIndex
from oxillama_torch.engine.speculation.pace import Guessing, Pace
from oxillama_torch.engine.speculation.proposer import Wish

LINKS, LONGEST = 16, 16


def searched(tokens: list[int]) -> int | None:
    """Among the latest 16 earlier places of the last pair: the end of the longest match."""
    last = len(tokens) - 1
    places = [p for p in range(last - 1, 0, -1) if tokens[p - 1 : p + 1] == tokens[last - 1 :]]

    def length(place):
        count = 0
        while count < min(place + 1, LONGEST) and tokens[place - count] == tokens[last - count]:
            count += 1
        return count

    return max(places[:LINKS], key=lambda place: (length(place), place), default=None)


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(1, 90))
def test_the_longest_match_and_of_those_the_latest(tokens, indexed_at_once):
    growing: list[int] = []
    index = TokenIndex(growing)
    for token in tokens:
        growing.append(token)
        while not index.extend(indexed_at_once):
            pass
        assert index.find() == searched(growing)


def propose(tokens: list[int], most: int) -> list[int]:
    state = SimpleNamespace(token_ids=tokens, guessing=Guessing(Pace(most)))
    [guess] = LookupProposer().propose([Wish(state, most)])
    return list(guess)


def test_what_came_behind_the_match():
    assert propose([9, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 3) == [4, 5, 6]
    assert propose([1, 2, 7, 8, 0, 1, 2, 5, 8, 1, 2], 1) == [5], "the latest of equally long ones"
    assert propose([0, 1, 2, 7, 8, 3, 1, 2, 5, 8, 0, 1, 2], 1) == [7], "a longer one before it"


def test_nothing_where_the_last_pair_is_new():
    assert propose([1, 2, 3, 4], 4) == [] and propose([5], 4) == [] and propose([5, 5], 4) == []


def test_a_repetition_goes_on():
    assert propose([7, 7, 7], 4) == [7, 7, 7, 7]
    assert propose([5, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


def test_a_long_prompt_is_taken_in_over_several_calls():
    tokens = [1, 2, 3, *range(10, 20_000), 1, 2]
    state = SimpleNamespace(token_ids=tokens, guessing=Guessing(Pace(4)))
    proposer, wish = LookupProposer(), Wish(state, 1)
    guesses = [list(proposer.propose([wish])[0]) for _ in range(3)]
    assert guesses == [[], [], [3]]
