"""What is made to be expensive is refused before it costs anything.

Oracle: what is not called, and how many errors are written; ``scripts/bench_hostile.py`` times it.
"""

import pytest
from pydantic import ValidationError

from oxillama_torch.chat import answer
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.constraint_gbnf import gbnf_to_lark
from oxillama_torch.server import strict_json
from oxillama_torch.server.schemas.chat import ChatBody
from oxillama_torch.server.schemas.completions import CompletionBody
from oxillama_torch.tokenizer.chat_template import ChatTemplate


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (ChatBody, {"messages": [0] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [0] * 1000}]}),
        (CompletionBody, {"prompt": ["a", *[1.5] * 1000]}),
    ],
    ids=["messages", "parts", "prompts"],
)
def test_a_list_is_checked_up_to_its_first_wrong_item(body, fields):
    with pytest.raises(ValidationError) as caught:
        body.model_validate({"model": "m", **fields})
    assert len(caught.value.errors()) <= 4  # one for each type that the list might have had


def test_more_messages_than_openai_takes_are_refused():
    messages = [{"role": "user", "content": "a"}] * 2048
    ChatBody.model_validate({"model": "m", "messages": messages})
    with pytest.raises(ValidationError, match="2048"):
        ChatBody.model_validate({"model": "m", "messages": [*messages, messages[0]]})


@pytest.mark.parametrize("raw", [b'{"a":1,' * 60_000, b'"' * 2_000_000], ids=["keys", "quotes"])
def test_keys_and_quotes_are_counted_before_anything_is_made_of_them(raw, monkeypatch):
    monkeypatch.setattr(strict_json, "MAX_CONTAINERS", 1_000_000)
    monkeypatch.setattr(strict_json.orjson, "loads", None)
    with pytest.raises(RequestError, match="keys"):
        strict_json.loads(raw)


def test_a_chat_that_cannot_fit_is_not_rendered(client, model_id, monkeypatch):
    monkeypatch.setattr(ChatTemplate, "_render", None)
    words = {"role": "user", "content": "<|im_end|>" * 30_000}
    answered = client.post(
        "/v1/chat/completions", json={"model": model_id, "messages": [words] * 10}
    )
    error = answered.get_json()["error"]
    assert (answered.status_code, error["code"]) == (400, "context_length_exceeded")


def test_a_grammar_that_is_all_of_the_answer_is_left_to_the_worker(monkeypatch):
    monkeypatch.setattr(answer, "gbnf_to_lark", None)
    grammar = Constraint("gbnf", 'root ::= "a"')
    assert answer.answer_of(None, grammar).constraint is grammar


def test_beside_tools_a_grammar_is_short():
    part = answer.Answer(Constraint("gbnf", 'root ::= "' + "a" * 9_000 + '"', "grammar"))
    assert part.can_be_part
    with pytest.raises(RequestError, match="at most 8192 characters"):
        part.body()


def test_a_chain_of_rules_is_looked_through_once():
    """With a pass per rule these took a minute."""
    rules = "".join(f"r{i} ::= r{i + 1}\n" for i in range(20_000))
    assert "start" in gbnf_to_lark(f'root ::= r0\n{rules}r20000 ::= "a"\n')
