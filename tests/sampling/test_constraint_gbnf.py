"""GBNF: llama.cpp's definition, by example.

https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md and, for what it leaves open,
its parser (src/llama-grammar.cpp). Grammars under support/grammars are our own, of the same kinds
as llama.cpp's samples.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from grammar_acceptor import accepts
from hypothesis import given, settings
from hypothesis import strategies as st

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_gbnf import GbnfError, gbnf_to_lark

GRAMMARS = Path(__file__).parents[1] / "support" / "grammars"

SAMPLES = {
    "arithmetic": (["x = 3*(y+4.25)\n", "a=1\nb=2\n"], ["x = 3", "x == 3\n", "1 2=3\n"]),
    "json": (
        ['{"a": [1, -2.5e3], "b\\u00e9": {}}', '"🙂"', " null", "[]"],
        ["{a: 1}", "01", '{"a" 1}', "[1,]", '"\n"'],
    ),
    "chess": (["1. e4 e5\n2. Nf3 Nc6\n", "1. O-O O-O-O#\n"], ["1. e9 e5\n", "e4 e5\n"]),
    "list": (["- one\n- zwei, drei\n"], ["- one", "one\n", "- \n"]),
    "english": (['It works, "mostly" - I think.\n'], ["naïve", ""]),
    "japanese": (["ひらがな カタカナ。漢字"], ["ひらカタ", "abc"]),
    "c": (
        ["int main(int a, char b) {\n  return -a*2;}\n", "float f() {}\n"],
        ["int main( {}\n", "int f() {\n  return;}\n"],
    ),
}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_samples(name):
    good, bad = SAMPLES[name]
    constraint = Constraint("gbnf", (GRAMMARS / f"{name}.gbnf").read_text())
    for text in good:
        assert accepts(constraint, text), text
    for text in bad:
        assert not accepts(constraint, text), text


def test_every_sample_is_here():
    assert {path.stem for path in GRAMMARS.glob("*.gbnf")} == SAMPLES.keys()


@pytest.mark.parametrize(
    ("source", "good", "bad"),
    [
        (r'root ::= "\u0041" "\x41" "\U0001F642"', ["AA🙂"], ["A"]),
        (r'root ::= "\"\\\n\t\r\[\]"', ['"\\\n\t\r[]'], []),
        (r"root ::= [\u0041-\u0043\]\\^]", ["A", "C", "]", "\\", "^"], ["D", "-"]),
        ("root ::= [-a] [a-]", ["-a", "a-", "--"], ["b-"]),
        ("root ::= [^\\n]", ["é", "🙂"], ["\n", ""]),
        ("root ::= .", ["a", "\n", "é"], ["", "ab"]),
        ('root ::= "ab"{2} "c"{1,2} "d"{0,} "e"?', ["ababc", "ababccddde"], ["abc", "ababccc"]),
        ('root ::= ("a" | "b" "c")+', ["a", "bcabc"], ["", "b"]),
        ('root ::= "a" |\n  "b"\nother ::= "c"', ["a", "b"], ["c"]),
        ('root ::= (\n  "a" # first\n  | "b"\n)', ["a", "b"], []),
        ('root ::= word "s"\nword ::= [a-z]+', ["cats", "ss"], ["s", "cat"]),
        ('root ::= ("a" | "ab") "bc"', ["abc", "abbc"], ["ab", "abb"]),
        ('root ::= ("a" | "ab") "bc" root?', ["abc", "abbcabc"], ["ab", "abbca"]),
        ('root ::= ("if" | [a-z]) "f" ("(" root ")")?', ["if", "iff", "if(xf)"], ["f", "if(f)"]),
        ('root ::= | "a" root', ["", "aaa"], ["b"]),
        ('root ::= start R2-x\nstart ::= "a"\nR2-x ::= "b"', ["ab"], ["a"]),
        ("root ::= [&&~~a] [/]", ["&/", "~/"], ["/"]),
        ('root ::= ("a"{0,2}){2}', ["", "aaaa"], ["aaaaa"]),
        ('root ::= "a"{0}', [""], ["a"]),
    ],
)
def test_syntax(source, good, bad):
    constraint = Constraint("gbnf", source)
    for text in good:
        assert accepts(constraint, text), text
    for text in bad:
        assert not accepts(constraint, text), text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no rule 'root'"),
        ('start ::= "a"', "no rule 'root'"),
        ("root ::= other", "'other', which is not defined"),
        ('root ::= "a"\nroot ::= "b"', "defined twice .line 2"),
        ('root ::= "a', "does not end .line 1, column 12"),
        ("root ::= [a", "does not end"),
        ("root ::= [z-a]", "ends before it begins"),
        ("root ::= []", "empty class"),
        ('root ::= ("a"', r"'\)' is missing"),
        ('root ::= "a" )', "not understood"),
        ('root = "a"', "'::=' is missing"),
        (r'root ::= "\q"', "unknown escape"),
        (r'root ::= "\uD800"', "no character"),
        ('root ::= "a"{3,2}', "fewer than the least"),
        ('root ::= "a"{2001}', "more than 2000"),
        ('root ::= "a"{x}', "malformed"),
        ('root ::= root "a" | "a"', "'root' is left-recursive"),
        ('root ::= a\na ::= b? a "x" | "y"\nb ::= "z"', "'a' is left-recursive"),
        ('root ::= "q" | a\na ::= (b | "c") "d"\nb ::= [x]* a', "left-recursive"),
        ("root ::= " + "(" * 80 + '"a"' + ")" * 80, "groups within more than"),
    ],
)
def test_refusals_say_what_and_where(source, message):
    with pytest.raises(GbnfError, match=message):
        gbnf_to_lark(source)
    with pytest.raises(RequestError) as caught:
        accepts(Constraint("gbnf", source, "grammar"), "a")
    assert caught.value.param == "grammar"


def test_right_recursion_and_middle_recursion_are_fine():
    constraint = Constraint("gbnf", 'root ::= "(" root? ")" root?')
    assert accepts(constraint, "(()())()") and not accepts(constraint, "(()")


def ends(items, text: str, start: int, rules) -> set[int]:
    """Where a sequence of parts may end that starts at ``start``: the definition, spelled out."""
    places = {start}
    for kind, value, least, most in items:
        reached, level = (places if least == 0 else set()), places
        for count in range(1, (len(text) + 1 if most is None else most) + 1):
            level = {end for place in level for end in one(kind, value, text, place, rules)}
            if count >= least:
                reached = reached | level
            if not level:
                break
        places = reached
    return places


def one(kind, value, text: str, place: int, rules) -> set[int]:
    if kind == "text":
        return {place + len(value)} if text.startswith(value, place) else set()
    if kind == "class":
        return {place + 1} if text[place : place + 1] and text[place] in value else set()
    alternatives = rules[value] if kind == "rule" else value
    return {end for items in alternatives for end in ends(items, text, place, rules)}


def written(alternatives) -> str:
    def part(kind, value, least, most) -> str:
        body = {
            "text": lambda: f'"{value}"',
            "class": lambda: f"[{value}]",
            "rule": lambda: value,
            "group": lambda: f"({written(value)})",
        }[kind]()
        return f"{body}{{{least},{'' if most is None else most}}}"

    return " | ".join(" ".join(part(*i) for i in items) or '""' for items in alternatives)


TIMES = st.sampled_from([(1, 1)] * 5 + [(0, 1), (0, None), (1, None), (1, 2), (2, 2)])


def items(letters: str, *leaves: str, longest: int = 3) -> st.SearchStrategy:
    leaf = st.one_of(
        st.tuples(st.just("text"), st.text(letters, min_size=1, max_size=longest)),
        st.tuples(st.just("class"), st.text(letters, min_size=1, max_size=3)),
        *(st.tuples(st.just("rule"), st.just(name)) for name in leaves),
    )
    part = st.recursive(
        leaf,
        lambda inner: st.tuples(
            st.just("group"), alternatives(st.builds(lambda p, t: (*p, *t), inner, TIMES))
        ),
        max_leaves=3,
    )
    return st.builds(lambda p, t: (*p, *t), part, TIMES)


def alternatives(item: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(st.lists(item, max_size=3), min_size=1, max_size=3)


def agree(rules, texts) -> None:
    source = "\n".join(f"{name} ::= {written(body)}" for name, body in rules.items())
    constraint = Constraint("gbnf", source)
    for text in texts:
        expected = len(text) in ends([("rule", "root", 1, 1)], text, 0, rules)
        assert accepts(constraint, text) == expected, (source, text)


@settings(max_examples=100, deadline=None)
@given(
    root=alternatives(items("ab", "x", "y")),
    x=alternatives(items("ab", "y")),
    y=alternatives(items("ab")),
    texts=st.lists(st.text("ab", max_size=6), min_size=1, max_size=20),
)
def test_any_grammar_without_recursion_means_what_the_definition_says(root, x, y, texts):
    agree({"root": root, "x": x, "y": y}, texts)


@settings(max_examples=200, deadline=None)
@given(
    root=alternatives(items(",;", "x", "y", "w", longest=1)),
    x=alternatives(items("ab")),
    y=alternatives(items("01a")),
    closing=st.sampled_from([")", ")a", "a)"]),
    texts=st.lists(
        st.lists(
            st.sampled_from(["a", "b", "0", "1", ",", ";", "(", ")", "()", "(a)"]), max_size=7
        ),
        min_size=1,
        max_size=20,
    ),
)
def test_any_recursive_grammar_means_what_the_definition_says(root, x, y, closing, texts):
    """Rules over letters of their own may be lexemes; with ``a`` in both, they may not always."""
    w = [[("text", "(", 1, 1), ("rule", "root", 1, 1), ("text", closing, 1, 1)]]
    agree({"root": root, "x": x, "y": y, "w": w}, map("".join, texts))


@pytest.mark.parametrize(
    ("x", "y", "good", "bad"),
    [
        ("[ab]+", '"b"', ["ab", "abb", "bb"], ["a", "ba"]),
        ('"a" | "ab"', '"bc"', ["abc", "abbc"], ["ab", "ac"]),
        ('"a" "b"?', '"b"', ["ab", "abb"], ["a"]),
        ('("a" | "aa"){2}', '"a"', ["aaa", "aaaa", "aaaaa"], ["aa", "aaaaaa"]),
        ('("a" | "ab") "b"', '"b"', ["abb", "abbb"], ["ab", "abbbb"]),
        ('"if"', '"f" | [f-z]', ["ifx", "iff"], ["if", "ix"]),
        ("[a-z]", '"if" | "f"', ["if", "iif", "xf"], ["i", "fif("]),
        ('"a" ","?', '","', ["a,", "a,,"], ["a"]),
        ('"a"* "b"', '"a"', ["ba", "aaba"], ["aa"]),
        ('[a-z]+ | "1,2"', '","', ["ab,", "1,2,"], ["1,", "ab"]),
    ],
)
def test_lexemes_that_would_be_too_long(x, y, good, bad):
    """The same inside brackets, so that the grammar is recursive and its rules may be lexemes."""
    constraint = Constraint("gbnf", f'root ::= x y | "(" root ")"\nx ::= {x}\ny ::= {y}')
    for text in good:
        assert accepts(constraint, text) and accepts(constraint, f"(({text}))"), text
    for text in bad:
        assert not accepts(constraint, text) and not accepts(constraint, f"({text})"), text


def test_which_rules_are_lexemes():
    """Those of JSON are; with a word that may go on with what follows it, none is."""
    json_rules = gbnf_to_lark((GRAMMARS / "json.gbnf").read_text())
    assert '"true"' in json_rules and "R" in json_rules
    apart = 'root ::= word ("," root)?\nword ::= [a-z]+'
    assert "R1: " in gbnf_to_lark(apart)
    for unclear in (apart.replace('","', '"s"'), apart.replace("[a-z]+", '"a" | "a,b"')):
        assert "R" not in gbnf_to_lark(unclear)
