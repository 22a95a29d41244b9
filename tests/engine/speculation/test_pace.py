"""How many guesses come next, by hand."""

from __future__ import annotations

from oxillama_torch.engine.speculation.pace import Pace


def turns(pace: Pace, rights: list[int]) -> list[int]:
    """Guesses per step, when so many of them are right."""
    made = []
    for right in rights:
        made.append(pace.turn())
        if made[-1]:
            pace.learn(made[-1], right)
    return made


def test_right_guesses_double_up_to_the_limit():
    assert turns(Pace(12), [4, 8, 12, 12]) == [4, 8, 12, 12]
    assert turns(Pace(2), [2, 2]) == [2, 2]


def test_half_right_guesses_set_the_next_number():
    assert turns(Pace(8), [2, 1, 2, 4]) == [4, 3, 2, 4]


def test_pauses_grow_while_nothing_is_right():
    made = turns(Pace(8), [0] * 260)
    places = [step for step, guesses in enumerate(made) if guesses]
    assert places[:5] == [0, 1, 4, 11, 26] and made[0] == 4 and made[1] == 1
    assert max(after - before for before, after in zip(places, places[1:])) == 65


def test_one_right_guess_ends_the_pauses():
    pace = Pace(8)
    turns(pace, [0] * 27)
    made = turns(pace, [1] * 40)
    first = made.index(1)
    assert made[first:][:4] == [1, 2, 2, 2] and not any(made[:first])
