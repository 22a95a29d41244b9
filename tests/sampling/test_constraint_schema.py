"""JSON schemas: each keyword is enforced as the specification says, or refused by its name.

Oracle: jsonschema decides which texts are valid; nothing it calls invalid may be accepted.
"""

from __future__ import annotations

import datetime
import json

import jsonschema
import pytest
from grammar_acceptor import accepts
from hypothesis import given, settings
from hypothesis import strategies as st

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_schema import ENFORCED, FORMATS, IGNORED, prepare_schema

#: Keyword -> (schema, texts to accept, texts to reject).
CASES: dict[str, tuple[dict, list[str], list[str]]] = {
    "type": ({"type": ["integer", "null"]}, ["1", "null", "-7"], ['"1"', "1.5", "true", "01"]),
    "enum": ({"enum": [1, "a", {"b": [None]}]}, ["1", '"a"', '{"b": [null]}'], ["2", "null"]),
    "const": ({"const": {"a": [1, True]}}, ['{"a": [1, true]}'], ["{}", '{"a": [true, 1]}']),
    "anyOf": ({"anyOf": [{"type": "null"}, {"type": "string"}]}, ["null", '"x"'], ["1"]),
    "oneOf": ({"oneOf": [{"const": "a"}, {"type": "null"}]}, ['"a"', "null"], ["3"]),
    "allOf": ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, ["3"], ["2", "3.5"]),
    "$ref": (
        {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"items": {"$ref": "#"}, "type": "array"}}},
        ["[]", "[[], [[]]]"],
        ["1", "[1]"],
    ),
    "items": ({"type": "array", "items": {"type": "integer"}}, ["[]", "[1, 2]"], ['["a"]']),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "string"}], "items": {"type": "integer"}},
        ["[]", '["a"]', '["a", 1]'],
        ["[1]", '["a", "b"]'],
    ),
    "minItems": ({"type": "array", "minItems": 2}, ["[1, 2]"], ["[]", "[1]"]),
    "maxItems": ({"type": "array", "maxItems": 1}, ["[]", "[1]"], ["[1, 2]"]),
    "properties": (
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        ["{}", '{"a": 1}', '{"b": "x"}'],
        ['{"a": "x"}', '{"\\u0061": "x"}', '{"b": 1, "a": "x"}'],
    ),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^n_": {"type": "null"}}},
        ['{"n_1": null}', '{"x": 1}'],
        ['{"n_1": 1}'],
    ),
    "additionalProperties": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
        ["{}", '{"a": 1}'],
        ['{"b": 1}'],
    ),
    "required": ({"type": "object", "required": ["a"]}, ['{"a": 1}'], ["{}", '{"b": 1}']),
    "minProperties": ({"type": "object", "minProperties": 1}, ['{"a": 1}'], ["{}"]),
    "maxProperties": (
        {"type": "object", "maxProperties": 1},
        ["{}", '{"a": 1}'],
        ['{"a": 1, "b": 2}'],
    ),
    "minLength": ({"type": "string", "minLength": 2}, ['"é🙂"', '"ab"'], ['"a"', '""']),
    "maxLength": ({"type": "string", "maxLength": 2}, ['"é🙂"', '"\\n\\t"'], ['"abc"']),
    "pattern": ({"type": "string", "pattern": "^a|b$"}, ['"ax"', '"xb"'], ['"xax"', '"bx"']),
    "format": ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"x"']),
    "minimum": ({"type": "number", "minimum": -1.5}, ["-1.5", "0", "7.25"], ["-1.51", "-2"]),
    "maximum": ({"type": "integer", "maximum": 10}, ["10", "-99"], ["11", "100"]),
    "exclusiveMinimum": ({"type": "integer", "exclusiveMinimum": 3}, ["4"], ["3", "-4"]),
    "exclusiveMaximum": ({"type": "number", "exclusiveMaximum": 1}, ["0.99"], ["1", "1.0", "2"]),
    "multipleOf": ({"type": "integer", "multipleOf": 7}, ["0", "7", "-14", "49"], ["1", "48"]),
}


@pytest.mark.parametrize("keyword", sorted(CASES))
def test_enforced(keyword):
    schema, good, bad = CASES[keyword]
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.FormatChecker(["date"])
    )
    constraint = Constraint.json_schema(schema)
    for text in good:
        assert validator.is_valid(json.loads(text)) and accepts(constraint, text), text
    for text in bad:
        try:
            valid = validator.is_valid(json.loads(text))
        except json.JSONDecodeError:
            valid = False
        assert not valid and not accepts(constraint, text), text


def kind(value, **properties):
    return {
        "type": "object",
        "properties": {"kind": {"const": value}, **properties},
        "required": ["kind", *properties],
        "additionalProperties": False,
    }


APART = {
    "constants": [{"const": 1}, {"const": 2}, {"enum": ["1", True]}],
    "types": [{"type": "integer"}, {"type": ["string", "null"]}, {"type": "object"}],
    "kinds": [kind("a", size={"type": "integer"}), kind("b"), kind(3), kind(4)],
    "references": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    "choices": [
        {"anyOf": [{"const": 1}, {"type": "null"}]},
        {"oneOf": [{"const": 2}, {"const": 3}]},
    ],
}
OVERLAPPING = {
    "numbers": [{"type": "integer"}, {"type": "number"}],
    "equal": [{"const": 1}, {"const": 1.0}],
    "optional": [{"properties": {"a": {"const": 1}}}, {"properties": {"a": {"const": 2}}}],
    "not all objects": [{**kind(1), "type": ["object", "null"]}, {**kind(2), "type": ["null"]}],
    "no reference": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/b"}],
}
DEFS = {
    "a": {"allOf": [kind("a")]},
    "b": kind("b"),
    "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"$ref": "#/$defs/b"}]},
}


@pytest.mark.parametrize("name", sorted(APART))
def test_one_of_schemas_that_are_apart(name):
    schema = {"oneOf": APART[name], "$defs": DEFS}
    constraint = Constraint.json_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    texts = ["1", "2", "3", "4", '"1"', '"x"', "true", "null", "{}", '{"kind": "a"}', "[]"]
    texts += ['{"kind": "a", "size": 3}', '{"kind": "b"}', '{"kind": 3}', '{"kind": 5}']
    for text in texts:
        assert accepts(constraint, text) == validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("name", sorted(OVERLAPPING))
def test_one_of_schemas_that_may_overlap(name):
    with pytest.raises(RequestError, match="oneOf"):
        accepts(Constraint.json_schema({"oneOf": OVERLAPPING[name], "$defs": DEFS}), "1")


def test_items_as_a_list_with_additional_items():
    schema = {"items": [{"type": "integer"}], "additionalItems": {"type": "null"}, "type": "array"}
    constraint = Constraint.json_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    for text in ("[]", "[1]", "[1, null]", "[null]", "[1, 1]"):
        assert accepts(constraint, text) == validator.is_valid(json.loads(text))


def test_every_keyword_is_covered():
    assert set(CASES) | {"additionalItems"} == ENFORCED


@pytest.mark.parametrize(
    "keyword", sorted(IGNORED - {"$defs", "definitions", "$schema", "$anchor"})
)
def test_annotations_change_nothing(keyword):
    assert accepts(Constraint.json_schema({"type": "integer", keyword: "x"}), "1")


#: What vocabularies of every draft have, and what is in use without one.
# fmt: off
REFUSED = [
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems",
    "propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
    "unevaluatedProperties", "contentEncoding", "contentMediaType", "contentSchema", "$dynamicRef",
    "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary", "disallow",
    "divisibleBy", "extends", "nullable", "discriminator", "x-guidance", "xml", "example",
]
# fmt: on


@pytest.mark.parametrize("keyword", REFUSED)
@pytest.mark.parametrize("place", ["", ".properties.a", ".items", ".anyOf[1]", ".$defs.a"])
def test_refused_by_name_wherever_it_stands(keyword, place):
    inner = {keyword: True}
    schema = {
        "": inner,
        ".properties.a": {"properties": {"a": inner}},
        ".items": {"items": inner},
        ".anyOf[1]": {"anyOf": [{}, inner]},
        ".$defs.a": {"$defs": {"a": inner}},
    }[place]
    with pytest.raises(RequestError) as caught:
        prepare_schema(schema, "here")
    assert caught.value.param == f"here{place}.{keyword}" and repr(keyword) in str(caught.value)


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"format": "int32", "type": "integer"}, ".format"),
        ({"format": "unknown"}, ".format"),
        ({"minimum": 2**53 + 1}, ".minimum"),
        ({"enum": [1, [-(2**60)]]}, ".enum[1][0]"),
        ({"const": {"a": "nul\x00"}}, ".const.a"),
        ({"pattern": "^a\\u0001$"}, ".pattern"),
        ({"pattern": "^a[\\x00-\\x1f]$", "type": "string", "minLength": -1}, ""),
        ({"pattern": "[a-z&&b]"}, ".pattern"),
        ({"pattern": "[[:alpha:]]"}, ".pattern"),
        ({"patternProperties": {"a[\\u0001]": {}}}, ".patternProperties.a[\\u0001]"),
        ({"minProperties": 2}, ".minProperties"),
        ({"additionalItems": False}, ".additionalItems"),
        ({"anyOf": []}, ".anyOf"),
        ({"properties": []}, ".properties"),
        ({"items": 3}, ".items"),
        ({"$ref": "https://example.org/schema"}, ".$ref"),
        ({"$ref": "#/default", "default": {"type": "integer"}}, ".$ref"),
        ({"$ref": "#other", "$defs": {"a": {"$anchor": "this"}}}, ".$ref"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, ".$schema"),
        ({"items": {"$id": "inner"}}, ".items.$id"),
    ],
)
def test_refused_values_name_their_place(schema, param):
    with pytest.raises(RequestError) as caught:
        accepts(Constraint.json_schema(schema, "here"), "1")
    assert caught.value.param == f"here{param}"


def test_what_names_a_thing_twice_is_refused():
    with pytest.raises(RequestError, match="twice"):
        accepts(Constraint("json_schema", '{"type": "string", "type": "integer"}'), "1")


def test_properties_come_in_the_order_of_the_schema():
    schema = {"type": "object", "properties": {"z": {}, "a": {}}, "required": ["a", "z"]}
    constraint = Constraint.json_schema(schema)
    assert accepts(constraint, '{"z": 1, "a": 2}') and not accepts(constraint, '{"a": 2, "z": 1}')


def test_order_of_keywords_does_not_matter():
    parts = {
        "allOf": [{"properties": {"foo": True}}],
        "properties": {"bar": {"type": "null"}},
        "additionalProperties": {"type": "boolean"},
        "type": "object",
    }
    for turn in range(len(parts)):
        names = [*list(parts)[turn:], *list(parts)[:turn]]
        constraint = Constraint.json_schema({name: parts[name] for name in names})
        assert accepts(constraint, '{"foo": true}') and not accepts(constraint, '{"foo": 1}')


def test_white_space_is_bounded():
    constraint = Constraint("json_object")
    assert accepts(constraint, '{\n    "a": [1,\n\n\t\t2],\n    "b": {}\n}')
    assert not accepts(constraint, '{  "a": 1}') and not accepts(constraint, '{\n\n\n"a": 1}')


@pytest.mark.parametrize("name", sorted(name for name in FORMATS if FORMATS[name]))
def test_dates_and_times_are_exact(name):
    """Against datetime, on every day of years around the rules of leap years."""
    constraint = Constraint.json_schema({"type": "string", "format": name})
    tail = {"date": "", "time": None, "date-time": "T23:59:59.5+01:30"}[name]
    if tail is None:
        assert accepts(constraint, '"23:59:59Z"') and not accepts(constraint, '"23:59:60Z"')
        assert not accepts(constraint, '"24:00:00Z"') and not accepts(constraint, '"1:00:00Z"')
        return
    for year in (1, 4, 100, 400, 1900, 2000, 2023, 2024, 9999):
        for month in range(0, 14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                try:
                    datetime.date(year, month, day)
                    exists = True
                except ValueError:
                    exists = False
                text = f'"{year:04}-{month:02}-{day:02}{tail}"'
                assert accepts(constraint, text) == exists, text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab\n"\\é', max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)
LEAVES = st.sampled_from(
    [
        {"type": "string", "maxLength": 2},
        {"type": "integer", "minimum": -5, "exclusiveMaximum": 50},
        {"enum": ["a", 1, None, ["b"]]},
        {"type": "array", "maxItems": 2},
        {"type": "object", "maxProperties": 1},
        {"type": ["boolean", "null"]},
        {"pattern": "^a"},
        {"minItems": 1},
        True,
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
        st.builds(lambda a, b: {"allOf": [a, b]}, inner, inner),
        st.builds(lambda a: {"type": "array", "items": a}, inner),
        st.builds(lambda a, b: {"prefixItems": [a], "items": b}, inner, inner),
        st.builds(
            lambda a, b, r: {"properties": {"a": a, "b": b}, "required": r},
            inner,
            inner,
            st.sampled_from([[], ["a"], ["b", "a"]]),
        ),
        st.builds(
            lambda a, b: {"type": "object", "properties": {"a": a}, "additionalProperties": b},
            inner,
            inner,
        ),
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(schema=SCHEMAS, values=st.lists(VALUES, min_size=1, max_size=6))
def test_nothing_invalid_is_accepted(schema, values):
    constraint = Constraint.json_schema(schema)
    try:
        accepts(constraint, "1")
    except RequestError:
        return  # refused: llguidance says that nothing is valid, or that it cannot tell
    validator = jsonschema.Draft202012Validator(schema)
    for value in values:
        if accepts(constraint, json.dumps(value, ensure_ascii=False)):
            assert validator.is_valid(value), (schema, value)
