"""Every family's parser. Oracle: transcripts written by hand, and the json module."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies import TOOLS, ByteTokenizer, Outcome, read, thinking_of
from transcripts import FAMILIES, family, parsed, vocabulary_of

from oxillama_torch.chat.reader import Reader
from oxillama_torch.chat.reply import ReplyFormat
from oxillama_torch.chat.syntax import family_of

# Where text may come before calls.
AFTER_TEXT = sorted(set(FAMILIES) - {"llama", "generic", "harmony"})


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
def test_calls_are_read_however_they_are_cut(name, tokens):
    vocabulary = vocabulary_of(name, tokens=tokens)
    reply, calls = FAMILIES[name][2:]
    whole = read(family(name, vocabulary), reply, vocabulary)
    assert parsed(whole.calls) == calls
    assert whole.text == whole.thought == ""
    for step in range(1, 12):
        cut = read(family(name, vocabulary), reply, vocabulary, step=step)
        assert cut.calls == whole.calls, step
        assert (cut.text, cut.thought) == ("", "")


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_may_be_single_bytes(name):
    """From token ids on; letters of two and four bytes come in pieces."""
    vocabulary = vocabulary_of(name)
    text = FAMILIES[name][2].replace("Oslo", "Ósló 🙂")
    reply = ReplyFormat(family(name, vocabulary), None, TOOLS).reply(ByteTokenizer(vocabulary), ())
    outcome = Outcome()
    for token_id in vocabulary.ids(text):
        outcome.add(reply.push(token_id))
    outcome.add(reply.flush())
    (called, arguments), *_ = parsed(outcome.calls)
    assert (called, arguments["city"]) == ("get_weather", "Ósló 🙂")
    assert (outcome.text, reply.calls) == ("", len(FAMILIES[name][3]))


@pytest.mark.parametrize("name", AFTER_TEXT)
def test_text_before_calls_is_the_answer(name):
    vocabulary = vocabulary_of(name)
    reply, calls = FAMILIES[name][2:]
    for step in (None, 1, 3):
        outcome = read(
            family(name, vocabulary), "Let me see: <a>\n\n" + reply, vocabulary, step=step
        )
        assert outcome.text == "Let me see: <a>"
        assert parsed(outcome.calls) == calls


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reply_that_ends_anywhere_loses_nothing(name):
    """Cut off, a reply is a call with the arguments so far, or it is text; never neither."""
    vocabulary = vocabulary_of(name, tokens=False)
    reply, calls = FAMILIES[name][2:]
    whole = read(family(name, vocabulary), reply, vocabulary).calls
    for end in range(len(reply)):
        outcome = read(family(name, vocabulary), reply[:end], vocabulary)
        again = read(family(name, vocabulary), reply[:end], vocabulary, step=1)
        assert outcome == again
        if not outcome.calls:
            assert outcome.text == reply[:end]
        assert [n for n, _ in outcome.calls] == [n for n, _ in whole[: len(outcome.calls)]]
        for (_, got), (_, full) in zip(outcome.calls[:-1], whole):
            assert json.loads(got) == json.loads(full)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_tool_is_text(name):
    vocabulary = vocabulary_of(name, tokens=False)
    reply = FAMILIES[name][2].replace("get_weather", "rm_rf").replace("get-time", "nope")
    outcome = read(family(name, vocabulary), reply, vocabulary)
    assert outcome.calls == []
    if name != "harmony":  # the message's header is left out
        assert outcome.text == reply


@pytest.mark.parametrize("name", FAMILIES)
def test_without_tools_nothing_is_a_call(name):
    vocabulary = vocabulary_of(name, tokens=False)
    outcome = read(family(name, vocabulary), FAMILIES[name][2], vocabulary, tools=())
    assert outcome.calls == []


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_garbage_comes_out_the_same_however_it_is_cut(name, data):
    """Pieces of real replies in any order, mixed with anything."""
    vocabulary = vocabulary_of(name, more=("<think>", "</think>"))
    reply = FAMILIES[name][2]
    pieces = vocabulary._pattern.split(reply) + ['{"name": "', '"}', "[", "]", "```json\n", "é\n"]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces) | st.text(max_size=5), max_size=9)))
    text = text.encode("utf-8", "replace").decode()
    maker = family(name, vocabulary)
    thinking = thinking_of(maker, "<think>", "</think>", opened=data.draw(st.booleans()))
    whole = read(maker, text, vocabulary, thinking=thinking)
    for step in (1, 2, 5):
        assert read(maker, text, vocabulary, thinking=thinking, step=step) == whole
    if name == "harmony":  # its markers are everywhere, and never shown
        return
    said = whole.text + whole.thought + "".join(a for _, a in whole.calls)
    assert len(said) <= len(text) + 40 * len(whole.calls)
    if not whole.calls and "think>" not in text:
        assert whole.text + whole.thought in text


def test_markers_written_out_are_text_where_they_are_tokens():
    vocabulary = vocabulary_of("hermes")
    maker = family("hermes", vocabulary)
    reply = '{"name": "get-time", "arguments": {}}'
    assert read(maker, f"<tool_call>{reply}</tool_call>", vocabulary).calls
    plain = vocabulary_of("hermes", tokens=False)
    assert read(family("hermes", plain), f"<tool_call>{reply}</tool_call>", plain).calls
    reader = Reader(lambda r: maker.read(r, None, True), tools={tool.name: tool for tool in TOOLS})
    parts = [*reader.push(f"<tool_call>{reply}</tool_call>"), *reader.end()]
    assert [type(part).__name__ for part in parts] == ["Text"]


def test_families_are_told_apart():
    """A name in the table is the family's, perhaps with a version behind it."""
    for name, (source, *_rest) in FAMILIES.items():
        found = family_of(source).name
        assert name == found or name.startswith(f"{found}-")


HARMONY = (
    "<|channel|>analysis<|message|>They want <b>.<|end|><|start|>assistant<|channel|>commentary"
    "<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get-time "
    "<|constrain|>json<|message|>{}<|call|>"
)


@pytest.mark.parametrize("step", [None, 1, 4])
def test_harmony_channels(step):
    vocabulary = vocabulary_of("harmony")
    maker = family("harmony", vocabulary)
    thinking = thinking_of(maker, "<|channel|>", "<|end|>", opened=False)
    outcome = read(maker, HARMONY, vocabulary, thinking=thinking, step=step)
    assert outcome.thought == "They want <b>."
    assert outcome.text == "Let me look."
    assert outcome.calls == [("get-time", "{}")]
    final = (
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    outcome = read(maker, final, vocabulary, thinking=thinking, step=step)
    assert (outcome.thought, outcome.text) == ("Hm", "Yes.")
    # The recipient may stand before the channel, and a text may come without any header.
    early = " to=functions.get-time<|channel|>commentary<|message|>{}"
    assert read(maker, early, vocabulary, step=step).calls == [("get-time", "{}")]
    assert read(maker, "Hello.", vocabulary, step=step).text == "Hello."


@pytest.mark.parametrize("step", [None, 1, 4])
def test_gemmas_fences(step):
    vocabulary = vocabulary_of("generic")
    maker = family("generic", vocabulary)
    code = "Sure.\n```tool_code\nprint(get_weather(city='Oslo', days=2))\n```"
    outcome = read(maker, code, vocabulary, step=step)
    assert outcome.text == "Sure."
    assert parsed(outcome.calls) == [("get_weather", {"city": "Oslo", "days": 2})]
    fence = '```json\n{"name": "get-time", "parameters": {}}\n```'
    assert read(maker, fence, vocabulary, step=step).calls == [("get-time", "{}")]
    for text in ("```python\nx = 1\n```", "```tool_code\nimport os\n```", '```json\n{"a": 1}\n```'):
        assert read(maker, text, vocabulary, step=step) == Outcome(text=text)


@pytest.mark.parametrize(
    "call",
    [
        '{"arguments": {"city": "Oslo"}, "name": "get_weather"}',
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}',
        '{"type": "function", "function": {"name": "get_weather", "parameters": {"city": "Oslo"}}}',
        '{"id": "0", "name": "get_weather", "arguments": {"city": "Oslo"}, "type": "function"}',
        '{"name": "get_weather", "arguments": {"city": "Oslo"}',
    ],
)
@pytest.mark.parametrize("step", [None, 1, 2])
def test_spellings_of_a_call_object(call, step):
    vocabulary = vocabulary_of("hermes")
    outcome = read(
        family("hermes", vocabulary), f"<tool_call>{call}</tool_call>", vocabulary, step=step
    )
    assert parsed(outcome.calls) == [("get_weather", {"city": "Oslo"})]
    assert outcome.text == ""


@pytest.mark.parametrize("arguments", ["null", '""', None])
def test_no_arguments_are_an_empty_object(arguments):
    vocabulary = vocabulary_of("hermes")
    field = "" if arguments is None else f', "arguments": {arguments}'
    call = f'<tool_call>{{"name": "get-time"{field}}}</tool_call>'
    assert read(family("hermes", vocabulary), call, vocabulary).calls == [("get-time", "{}")]


@pytest.mark.parametrize("step", [None, 1, 3])
def test_stop_strings_end_the_answer_alone(step):
    vocabulary = vocabulary_of("hermes", more=("<think>", "</think>"))
    maker = family("hermes", vocabulary)
    thinking = thinking_of(maker, "<think>", "</think>", opened=True)
    reply = "a STOP b</think>Yes, STOP no"
    outcome = read(maker, reply, vocabulary, thinking=thinking, step=step, stop=("STOP",))
    assert (outcome.thought, outcome.text) == ("a STOP b", "Yes, ")
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "STOP"}}</tool_call>'
    outcome = read(maker, call, vocabulary, step=step, stop=("STOP",))
    assert parsed(outcome.calls) == [("get_weather", {"city": "STOP"})]


@pytest.mark.parametrize("step", [None, 1])
def test_reasoning_and_white_space(step):
    vocabulary = vocabulary_of("hermes", more=("<think>", "</think>"))
    maker = family("hermes", vocabulary)
    opened = thinking_of(maker, "<think>", "</think>", opened=True)
    closed = thinking_of(maker, "<think>", "</think>", opened=False)
    outcome = read(maker, "\nHm.\n\n</think>\n\nYes.\n ", vocabulary, thinking=opened, step=step)
    assert (outcome.thought, outcome.text) == ("Hm.", "Yes.\n ")
    outcome = read(maker, "<think>\n\n</think>\n\nYes.", vocabulary, thinking=closed, step=step)
    assert (outcome.thought, outcome.text) == ("", "Yes.")
    outcome = read(maker, "Never ending", vocabulary, thinking=opened, step=step)
    assert (outcome.thought, outcome.text) == ("Never ending", "")
    outcome = read(maker, " \n Plain. \n", vocabulary, thinking=closed, step=step)
    assert outcome.text == " \n Plain. \n"


@pytest.mark.parametrize("step", [None, 1, 2])
def test_gemmas_notation(step):
    vocabulary = vocabulary_of("gemma", more=("<|channel>", "<channel|>"))
    maker = family("gemma", vocabulary)
    thinking = thinking_of(maker, "<|channel>", "<channel|>", opened=False)
    reply = (
        '<|channel>thought\nHm "x".<channel|><|tool_call>call:get_weather{city:<|"|>A "b"\nc<|"|>,'
        'more:{list:[<|"|>x<|"|>,1.5,true,{}],none:null,empty:[]}}<tool_call|>'
    )
    outcome = read(maker, reply, vocabulary, thinking=thinking, step=step)
    assert outcome.thought == 'Hm "x".'
    more = {"list": ["x", 1.5, True, {}], "none": None, "empty": []}
    assert parsed(outcome.calls) == [("get_weather", {"city": 'A "b"\nc', "more": more})]
    assert outcome.text == ""
