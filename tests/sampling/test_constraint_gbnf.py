"""GBNF: llama.cpp's definition, by example.

https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md and, for what it leaves open,
its parser (src/llama-grammar.cpp). Grammars under support/grammars are our own, of the same kinds
as llama.cpp's samples.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from grammar_acceptor import accepts

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
