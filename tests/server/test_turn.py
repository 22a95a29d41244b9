"""From a turn to the outputs of a route. Oracle: replies written by hand, played by an engine that
only hands out tokens, and the openai SDK's models.
"""

import dataclasses

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from replies import TOOLS

from oxillama_torch.config import ServerConfig
from oxillama_torch.engine.request import FinishEvent, PromptEvent, RequestHandle, TokenEvent
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.openai.chat import ChatForm
from oxillama_torch.server.schemas.chat import ChatBody
from oxillama_torch.server.service import Service
from oxillama_torch.server.turn import Turn, start_turn
from oxillama_torch.tokenizer.chat_template import ChatTemplate

SOURCE = (
    "<tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if enable_thinking | default(true) %}<think>\n{% endif %}"
)
REPLY = (
    "Which city? Oslo.\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
)


class Player:
    """An engine that answers every request with the same text."""

    alive = True
    max_context = 4096

    def __init__(self, ids, reason):
        self._ids, self._reason = ids, reason

    def submit(self, request, outbox=None):
        self.request = request
        handle = RequestHandle(request, lambda _: None, outbox)
        handle.put(PromptEvent(len(request.prompt_token_ids), 0))
        for token_id in self._ids:
            handle.put(TokenEvent(token_id))
        handle.put(FinishEvent(self._reason, len(self._ids)))
        return handle


@pytest.fixture(scope="module")
def template(llm):
    template = ChatTemplate(SOURCE, llm.tokenizer)
    yield template
    template.close()


@pytest.fixture
def play(llm, template):
    """Outputs, form and engine of a turn that is answered with a text."""

    def play(text, reason="stop", **fields):
        engine = Player(llm.tokenizer.encode(text, add_special=False), reason)
        service = dataclasses.replace(
            Service.from_llm(llm, ServerConfig()), engine=engine, template=template, owner=None
        )
        params = fields.pop("params", SamplingParams())
        turn = Turn(messages=[{"role": "user", "content": "Hi"}], params=params, **fields)
        generation = start_turn(service, turn)
        form = ChatForm(service, 1, False, True, remember=True)
        chunks = [c for output in generation.outputs() for c in form.chunks(output)]
        return ChatCompletion.model_validate(form.completion()), chunks, engine

    return play


def test_reasoning_answer_and_call(play, llm):
    completion, chunks, _ = play(REPLY, tools=TOOLS)
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning_content == "Which city? Oslo."
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Oslo"}')
    thought = llm.tokenizer.encode(REPLY.partition("\n\n")[0], add_special=False)
    reasoning = completion.usage.completion_tokens_details.reasoning_tokens
    assert abs(reasoning - len(thought)) <= 1  # the marker's last token may hold what follows
    deltas = [ChatCompletionChunk.model_validate(c).choices[0].delta for c in chunks]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == (
        "Which city? Oslo."
    )
    assert "".join(d.content or "" for d in deltas) == "Let me see."
    assert len([d for d in deltas if getattr(d, "reasoning_content", None)]) > 3


def test_reasoning_that_is_cut_off(play):
    completion, _, _ = play("Hm, hm", "length")
    [choice] = completion.choices
    assert (choice.finish_reason, choice.message.content) == ("length", "")
    assert choice.message.reasoning_content == "Hm, hm"
    assert completion.usage.completion_tokens_details.reasoning_tokens == (
        completion.usage.completion_tokens
    )


def test_reasoning_left_in_the_text(play):
    completion, _, _ = play("Hm.</think>Yes.", reasoning_apart=False)
    assert completion.choices[0].message.content == "Hm.</think>Yes."


def test_thinking_switched_off(play):
    completion, _, engine = play("Yes.", template_kwargs={"enable_thinking": False})
    assert completion.choices[0].message.content == "Yes."
    assert engine.request.params.constraint is None


def test_stop_strings_do_not_look_into_reasoning(play):
    params = SamplingParams(stop=("Oslo",))
    completion, _, _ = play("Oslo</think>In Oslo.", params=params)
    [choice] = completion.choices
    assert (choice.message.reasoning_content, choice.message.content) == ("Oslo", "In ")
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "variables", "budget"),
    [
        ({}, {}, None),
        (
            {"reasoning_effort": "none", "reasoning_budget": 7},
            {"reasoning_effort": "none", "enable_thinking": False, "thinking": False},
            7,
        ),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"thinking": False, "a": 1}},
            {"reasoning_effort": "high", "enable_thinking": True, "thinking": False, "a": 1},
            None,
        ),
        ({"thinking_token_budget": 3}, {}, 3),
        ({"reasoning_budget": -1}, {}, None),
    ],
)
def test_fields_about_reasoning(fields, variables, budget):
    body = ChatBody.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    )
    turn = body.turn(SamplingParams(), ())
    assert turn.template_kwargs == variables
    assert turn.reasoning_budget == budget
