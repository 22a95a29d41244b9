"""Strict JSON. Oracles: the standard library's parser with every key kept, and RFC 8259's cases."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxillama_torch.errors import RequestError
from oxillama_torch.server.strict_json import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES, loads

TRICKY = ['"', "\\", '\\"', "{", "}", "[", ":", ",", "a", "é", "\n", '":{', "\\\\"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.sampled_from(TRICKY)
        | st.text(st.sampled_from('"\\{}[]:,aé \n')),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(TRICKY), inner),
        max_leaves=20,
    ),
    st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_valid_documents_are_what_the_standard_library_reads(value, ascii):
    text = json.dumps(value, ensure_ascii=ascii)
    assert loads(text.encode()) == value


@given(st.lists(st.sampled_from(TRICKY), min_size=2, max_size=6), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_a_key_twice_is_refused_wherever_it_is(keys, depth):
    inner = "{" + ",".join(f"{json.dumps(k)}: [{i}, {{}}]" for i, k in enumerate(keys)) + "}"
    text = '{"x": [1, "}", ' * depth + inner + "]}" * depth
    if len(set(keys)) == len(keys):
        assert loads(text.encode()) == json.loads(text)
    else:
        with pytest.raises(RequestError, match="twice"):
            loads(text.encode())


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"NaN", b"[Infinity]", b"[1e999]", b"\xff", b'"\\ud800"', b'{"a":1,}', b"'a'",
     b"\xef\xbb\xbf{}", b"{}{}", b'{"a":1} x', b'"\x01"', b"01", b"+1", b".5", b"{a:1}",
     b'{"a":1,"\\u0061":2}', "{}".encode("utf-16")],
)  # fmt: skip
def test_what_is_no_strict_json_is_refused(raw):
    with pytest.raises(RequestError) as refused:
        loads(raw)
    assert refused.value.status == 400
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize(("open", "close"), [("[", "]"), ('{"a":', "}"), ('[{"b":', "}]")])
def test_depth_is_limited(open, close):
    def nested(levels):
        levels //= len([c for c in open if c in "[{"])
        return (open * levels + "1" + close * levels).encode()

    assert loads(nested(MAX_DEPTH)) is not None
    for levels in (MAX_DEPTH + 2, 1000, 50_000, 1_000_000):
        with pytest.raises(RequestError):
            loads(nested(levels))


def test_many_shallow_objects_are_no_depth():
    document = [{"a": [1]} for _ in range(1000)]
    assert loads(json.dumps(document).encode()) == document


def test_numbers_are_finite():
    assert math.isfinite(loads(b"[1e308]")[0])


def test_the_number_of_containers_is_limited_but_not_that_of_values_or_brackets_in_text():
    with pytest.raises(RequestError, match="objects and arrays"):
        loads(b"[" + b"[]," * MAX_CONTAINERS + b"1]")
    assert len(loads(b"[" + b"1," * 300_000 + b"1]")) == 300_001
    text = "[{" * MAX_CONTAINERS
    assert loads(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_too_many_values_are_refused():
    text = b"[" + b"1," * (MAX_VALUES - 1) + b"1]"
    assert len(loads(text)) == MAX_VALUES
    with pytest.raises(RequestError, match="values"):
        loads(text.replace(b"[", b"[1,"))
    loads(b'["' + b"," * MAX_VALUES + b'"]')
