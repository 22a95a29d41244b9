"""The demo model's training text: what is asked, what is answered, and what is kept out."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))  # the scripts are no package; they import each other by name

import demo_chat  # noqa: E402
import demo_corpus  # noqa: E402
import demo_tools  # noqa: E402


@pytest.fixture(scope="module")
def facts() -> list[demo_corpus.Fact]:
    return demo_corpus.facts()


def test_facts_are_sorted_unique_and_short(facts: list[demo_corpus.Fact]) -> None:
    names = [fact.name for fact in facts]
    assert names == sorted(set(names))
    assert 800 < len(facts) < 1200
    for fact in facts:
        assert 12 <= len(fact.summary) <= demo_corpus.MAX_ANSWER
        assert fact.summary == " ".join(fact.summary.split())
        assert not fact.signature or fact.signature.startswith(f"{fact.name}(")
        assert "0x" not in fact.signature


def test_a_fact_is_what_the_docstring_says(facts: list[demo_corpus.Fact]) -> None:
    dedent = next(fact for fact in facts if fact.name == "textwrap.dedent")
    assert dedent.summary == "Remove any common leading whitespace from every line in `text`."
    assert dedent.signature == "textwrap.dedent(text)"
    assert dedent.kind == "function"


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        (None, ""),
        ("f(x) -> int", ""),
        ("f(x) -> int\n\nAdd one\nto x.", "Add one to x."),
        ("f(x) -- Add one.", "Add one."),
        ("Add  one.\n\nMore.", "Add one."),
    ],
)
def test_first_paragraph(docstring: str | None, answer: str) -> None:
    assert demo_corpus.first_paragraph(docstring) == answer


def test_a_long_paragraph_ends_with_a_sentence_or_an_ellipsis() -> None:
    sentences = "This sentence has forty-three letters in it. " * 10
    cut = demo_corpus.first_paragraph(sentences)
    assert len(cut) <= demo_corpus.MAX_ANSWER
    assert cut.endswith("in it.")
    endless = demo_corpus.first_paragraph("word " * 100)
    assert len(endless) <= demo_corpus.MAX_ANSWER
    assert endless.endswith("word ...")


def test_signatures_drop_self_and_unstable_text() -> None:
    assert demo_corpus.signature_of("str.split", str.split) == "str.split(sep=None, maxsplit=-1)"
    default = object()  # its text holds an address, which differs from run to run
    assert demo_corpus.signature_of("f", lambda x=default: x) == ""


def test_held_out_files_are_not_trained_on() -> None:
    library = {name for name, _ in demo_corpus._library_files()}
    assert set(demo_corpus.HELD_OUT) <= library
    trained = {name for name, _ in demo_corpus.sources()}
    assert not trained & set(demo_corpus.HELD_OUT)
    assert not {Path(name).stem for name in demo_corpus.HELD_OUT} & set(demo_corpus.MODULES)
    assert (SCRIPTS / "demo_heldout.txt").stat().st_size < 60_000


def test_every_evaluation_question_is_one_of_the_templates() -> None:
    templates = demo_chat.MEANING_QUESTIONS + demo_chat.SIGNATURE_QUESTIONS
    openings = {template.partition("{")[0] for template in templates}
    lines = (SCRIPTS / "demo_questions.jsonl").read_text().splitlines()
    assert len(lines) == 200
    for line in map(json.loads, lines):
        assert line["answer"]
        assert any(line["question"].startswith(opening) for opening in openings)


def test_turns_repeat_for_one_seed_and_show_every_fact_once_a_round(
    facts: list[demo_corpus.Fact],
) -> None:
    one, other = (demo_chat.TurnSource(facts[:50], seed=3) for _ in range(2))
    assert [one.next_turn() for _ in range(300)] == [other.next_turn() for _ in range(300)]
    source = demo_chat.TurnSource(facts[:50], seed=3)
    answers = [source._meaning()[1]["content"] for _ in range(50)]
    assert sorted(answers) == sorted(fact.summary for fact in facts[:50])


def test_tool_arguments_are_copied_from_the_request() -> None:
    rng = random.Random(0)
    for _ in range(300):
        messages, tools = demo_tools.tool_conversation(rng)
        request, call = messages[0]["content"], messages[1]["tool_calls"][0]["function"]
        schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        assert set(call["arguments"]) == set(schema[call["name"]]["required"])
        assert all(str(value) in request for value in call["arguments"].values())
        assert json.loads(messages[2]["content"])


def test_the_template_renders_calls_in_hermes_form() -> None:
    messages, tools = demo_tools.tool_conversation(random.Random(1))
    text = demo_chat.render(messages, tools)
    call = text.split("<|im_start|>assistant\n")[1].partition("<|im_end|>")[0]
    body = call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
    assert json.loads(body) == messages[1]["tool_calls"][0]["function"]
    assert f"<tool_response>\n{messages[2]['content']}\n</tool_response><|im_end|>" in text
    listed = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line) for line in listed] == tools


def test_arguments_given_as_json_text_render_the_same() -> None:
    """The OpenAI API carries a call's arguments as a string, transformers as a mapping."""
    messages, tools = demo_tools.tool_conversation(random.Random(2))
    before = demo_chat.render(messages, tools)
    function = messages[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    assert demo_chat.render(messages, tools) == before


def test_a_prompt_ends_where_the_answer_begins() -> None:
    prompt = demo_chat.render([{"role": "user", "content": "Hi"}], prompt_only=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
