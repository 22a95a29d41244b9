"""Marked text behaves like plain text. Oracle: the same method on the unmarked string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxillama_torch.tokenizer.template_marks import Marks

MARK = "\U0001d000"
MARKS = Marks({MARK: "<"})
TEXT = st.text(st.sampled_from(["a", "b", " ", ">", "<", MARK]), max_size=12)
NEEDLE = st.text(st.sampled_from(["a", " ", ">", "<", MARK]), min_size=1, max_size=3)


def plain(value):
    if isinstance(value, str):
        return value.replace(MARK, "<")
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


def marks_in(value) -> int:
    return value.count(MARK) if isinstance(value, str) else sum(map(marks_in, value))


ONE_ARGUMENT = (
    "startswith endswith find rfind count strip lstrip rstrip removeprefix removesuffix split "
    "rsplit partition rpartition"
)


@pytest.mark.parametrize("method", ONE_ARGUMENT.split())
@given(text=TEXT, needle=NEEDLE)
def test_a_method_sees_through_marks(method, text, needle):
    found = MARKS.call(text, method, needle)
    assert plain(found) == getattr(plain(text), method)(plain(needle))


@pytest.mark.parametrize("method", ["split", "rsplit", "partition", "rpartition"])
@given(text=TEXT, needle=NEEDLE)
def test_pieces_keep_their_marks(method, text, needle):
    pieces = MARKS.call(text, method, needle)
    if method.endswith("partition"):
        assert "".join(pieces) == text
    else:
        assert all(piece in text for piece in pieces)


@given(text=TEXT, needle=NEEDLE, new=TEXT, count=st.integers(-1, 3))
def test_replace(text, needle, new, count):
    found = MARKS.call(text, "replace", needle, new, count)
    assert plain(found) == plain(text).replace(plain(needle), plain(new), count)


@given(text=TEXT, needle=NEEDLE, limit=st.integers(-1, 3))
def test_split_with_keywords(text, needle, limit):
    found = MARKS.call(text, "split", sep=needle, maxsplit=limit)
    assert plain(found) == plain(text).split(plain(needle), limit)


@pytest.mark.parametrize("method", ["strip", "lstrip", "rstrip", "split", "upper", "splitlines"])
@given(text=TEXT)
def test_methods_without_arguments(method, text):
    found = MARKS.call(text, method)
    assert plain(found) == getattr(plain(text), method)()
    assert marks_in(found) == marks_in(text)


@given(left=TEXT, right=TEXT)
def test_comparisons(left, right):
    assert MARKS.compare("eq", left, right) == (plain(left) == plain(right))
    assert MARKS.compare("ne", left, right) == (plain(left) != plain(right))
    assert MARKS.compare("in", left, right) == (plain(left) in plain(right))
    assert MARKS.compare("notin", left, [right]) == (plain(left) not in [plain(right)])
    assert MARKS.compare("in", left, {right: 1}) == (plain(left) in {plain(right): 1})


def test_an_empty_needle_raises_as_it_does_in_python():
    with pytest.raises(ValueError, match="empty separator"):
        MARKS.call(f"a{MARK}", "split", "")
