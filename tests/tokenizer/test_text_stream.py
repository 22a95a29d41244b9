"""Stop strings against the plain definition: text up to the occurrence that is complete first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxillama_torch.errors import RequestError
from oxillama_torch.tokenizer import TextStream

SMALL = st.text(st.sampled_from("ab\né🙂"), max_size=40)


def reference(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """Read the text character by character; cut the longest stop string it ends with."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def run(tokenizer, ids, stops) -> tuple[TextStream, list[str]]:
    stream = TextStream(tokenizer, stops)
    return stream, [*map(stream.push, ids), stream.flush()]


@given(SMALL, st.lists(st.text(st.sampled_from("ab\né🙂"), min_size=1, max_size=5), max_size=3))
def test_any_text_and_stops(chatml, text, stops):
    stream, shown = run(chatml, chatml.encode(text), tuple(stops))
    assert ("".join(shown), stream.finished) == reference(text, tuple(stops))


@given(SMALL, st.lists(st.text(st.sampled_from("ab\n"), min_size=1, max_size=5), max_size=3))
def test_the_result_does_not_depend_on_the_tokens(chatml, text, stops):
    one_byte_each = [i for char in text for i in chatml.encode(char)]
    stream, shown = run(chatml, one_byte_each, tuple(stops))
    assert ("".join(shown), stream.finished) == reference(text, tuple(stops))


@given(SMALL, st.lists(st.text(st.sampled_from("ab\n"), min_size=1, max_size=5), max_size=3))
def test_what_was_shown_is_never_taken_back(chatml, text, stops):
    expected, _ = reference(text, tuple(stops))
    stream, shown = TextStream(chatml, tuple(stops)), ""
    for token_id in chatml.encode(text):
        shown += stream.push(token_id)
        assert expected.startswith(shown)


def test_a_prefix_is_held_back_until_it_is_decided(chatml):
    stream = TextStream(chatml, ("abc",))
    ids = [chatml.encode(c)[0] for c in "xababd"]
    assert [stream.push(i) for i in ids] == ["x", "", "", "ab", "", "abd"]


def test_nothing_comes_after_a_stop_string(chatml):
    stream, shown = run(chatml, chatml.encode("one. two. three"), (". ",))
    assert "".join(shown) == "one" and stream.finished == ". "
    assert stream.push(chatml.encode("x")[0]) == "" and stream.flush() == ""


def test_the_held_back_tail_comes_at_the_end(chatml):
    stream, shown = run(chatml, chatml.encode("wait<|"), ("<|end",))
    assert "".join(shown) == "wait<|" and stream.finished is None


def test_special_tokens_are_not_text(chatml):
    ids = chatml.encode("a<|im_end|>b", parse_special=True)
    assert "".join(run(chatml, ids, ())[1]) == "ab"
    stream = TextStream(chatml, ("<|im_end|>",), skip_special=False)
    assert "".join(map(stream.push, ids)) == "a" and stream.finished == "<|im_end|>"


def test_a_long_stop_string_that_nearly_matches_throughout(chatml):
    """Quadratic matching would take minutes here."""
    stop = "a" * 2000 + "b"
    text = "a" * 50_000
    stream, shown = run(chatml, chatml.encode(text), (stop,))
    assert "".join(shown) == text and stream.finished is None


def test_empty_stop_strings_are_refused(chatml):
    with pytest.raises(RequestError, match="stop"):
        TextStream(chatml, ("a", ""))
