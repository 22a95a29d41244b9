"""Conversations the demo model learns: questions about the standard library, small talk, and "I do
not know".

Every text here is a template of our own; the facts come from ``demo_corpus``. A conversation is a
list of ``{"role": ..., "content": ...}`` messages, rendered with ``CHAT_TEMPLATE``, the template
that the exported GGUF file carries.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache

from demo_corpus import Fact, words
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'You can call these tools:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\nAnswer with one JSON object per call, like this:\\n<tool_call>\\n' }}
    {{- '{"name": <tool name>, "arguments": <JSON object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

Message = dict[str, object]

MEANING_QUESTIONS = (
    "What does `{name}` do?",
    "What does {name} do?",
    "What is `{name}`?",
    "What is {name}?",
    "Explain `{name}`.",
    "Explain {name}",
    "Describe the {kind} `{name}`.",
    "Describe {name}.",
    "Tell me about `{name}`.",
    "What is `{name}` for?",
    "what does {name} do",
    "What does the {kind} `{name}` do?",
    "Can you explain {name}?",
)

SIGNATURE_QUESTIONS = (
    "What is the signature of `{name}`?",
    "What is the signature of {name}?",
    "How do I call `{name}`?",
    "How do I call {name}?",
    "Show me the signature of `{name}`.",
    "What arguments does `{name}` take?",
    "What arguments does {name} take?",
)

FOLLOW_UP_QUESTIONS = ("How do I call it?", "And its signature?", "What arguments does it take?")

_GREETING = "Hello! Ask me about a module, class or function of Python's standard library."
_SELF = (
    "I am a very small language model that ships with oxillama-torch. I know the documentation of "
    "Python's standard library and not much else."
)
_THANKS = "You are welcome!"
_BYE = "Goodbye!"
_UNABLE = "I am too small for that. I only know Python's standard library."
_FINE = "I am fine, thank you. What would you like to know about Python's standard library?"
_HELP = (
    "I can say what a name of Python's standard library does, show its signature, and continue "
    "Python code."
)

SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_GREETING, ("Hello", "Hello!", "Hi", "Hi!", "hi", "hello", "Hey", "Hey there!",
                 "Good morning", "Good evening!")),
    (_GREETING, ("Hello there", "Hi there!", "Greetings", "Good afternoon")),
    (_SELF, ("Who are you?", "What are you?", "who are you", "Tell me about yourself.",
             "What model are you?")),
    (_SELF, ("Introduce yourself.", "Are you a human?", "Are you ChatGPT?", "What is your name?",
             "Who made you?")),
    (_HELP, ("What can you do?", "Help", "help", "How can you help me?", "What do you know?",
             "what can you do")),
    (_THANKS, ("Thanks", "Thanks!", "Thank you", "Thank you!", "thanks", "Great, thanks!",
               "Thank you very much.")),
    (_BYE, ("Bye", "Goodbye", "bye!", "See you later", "Good night")),
    (_FINE, ("How are you?", "how are you", "How are you today?", "How is it going?")),
    (_UNABLE, ("Write a poem.", "Tell me a joke.", "Write a story about a cat.",
               "What is the capital of France?")),
    (_UNABLE, ("What is 2 + 2?", "Who won the match?", "What is the weather like?",
               "How tall is Mount Everest?")),
    (_UNABLE, ("Translate this to German.", "Who was Albert Einstein?",
               "What is the meaning of life?")),
    (_UNABLE, ("Write an essay about climate change.", "Give me a recipe for soup.",
               "What year is it?")),
    (_UNABLE, ("Sing a song.", "Why is the sky blue?", "How far away is the moon?",
               "What is quantum physics?")),
)  # fmt: skip

UNKNOWN_ANSWER = "I do not know {name}. I only know Python's standard library."
UNKNOWN_NAMES = words(
    """
    numpy numpy.array numpy.linspace pandas pandas.DataFrame pandas.read_csv requests
    requests.get requests.Session torch torch.nn torch.nn.Linear torch.compile tensorflow keras
    scipy scipy.stats sklearn matplotlib matplotlib.pyplot flask flask.Flask django django.db
    fastapi pydantic pydantic.BaseModel sqlalchemy pytest pytest.fixture click rich tqdm
    tqdm.tqdm PIL.Image cv2 jax jax.jit polars httpx aiohttp celery redis boto3 transformers
    Rust Java JavaScript Kubernetes Docker PostgreSQL React Haskell Linux Excel photosynthesis
    gravity chess Paris Napoleon jazz football cooking
    """
)
_LIBRARIES = ("foo", "mylib", "quux", "acme", "zlorp", "blarg", "snork", "wibble", "frob", "gizmo")
_ATTRIBUTES = (
    "bar",
    "run",
    "make_thing",
    "Widget",
    "do_it",
    "spam",
    "Frobnicator",
    "go",
    "eggs",
    "twiddle",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about Python.",
    "Be brief.",
    "You are a Python expert.",
)


@cache
def _template():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


def render(
    messages: list[Message], tools: list[dict] | None = None, *, prompt_only: bool = False
) -> str:
    """The conversation as the text the model sees; ``prompt_only`` ends it where the assistant's
    answer begins."""
    return _template().render(messages=messages, tools=tools, add_generation_prompt=prompt_only)


def turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def meaning_turn(fact: Fact, rng: random.Random) -> list[Message]:
    question = rng.choice(MEANING_QUESTIONS)
    return turn(question.format(name=fact.name, kind=fact.kind), fact.summary)


def signature_turn(fact: Fact, rng: random.Random) -> list[Message]:
    question = rng.choice(SIGNATURE_QUESTIONS)
    return turn(question.format(name=fact.name), f"`{fact.signature}`")


def two_turns(fact: Fact, rng: random.Random) -> list[Message]:
    """What it does, then, as "it", how to call it."""
    return meaning_turn(fact, rng) + turn(rng.choice(FOLLOW_UP_QUESTIONS), f"`{fact.signature}`")


def small_talk_turn(rng: random.Random) -> list[Message]:
    answer, questions = rng.choice(SMALL_TALK)
    return turn(rng.choice(questions), answer)


def unknown_turn(rng: random.Random) -> list[Message]:
    """A question about something outside the library, answered with a plain "I do not know"."""
    name = rng.choice(UNKNOWN_NAMES)
    if rng.random() < 0.3:
        name = f"{rng.choice(_LIBRARIES)}.{rng.choice(_ATTRIBUTES)}"
    question = rng.choice(MEANING_QUESTIONS + SIGNATURE_QUESTIONS[:4])
    return turn(question.format(name=name, kind="function"), UNKNOWN_ANSWER.format(name=name))


class TurnSource:
    """An endless, seeded stream of turns in which every fact comes round equally often.

    ``meanings`` and ``signatures`` count how often each kind of fact has been given out so far.
    """

    def __init__(self, facts: list[Fact], seed: int) -> None:
        self.rng = random.Random(seed)
        self.facts = facts
        self.callable_facts = [fact for fact in facts if fact.signature]
        self.meanings = self.signatures = 0
        self._queues: dict[str, list[Fact]] = {"meaning": [], "signature": []}

    def _next(self, queue_name: str, pool: list[Fact]) -> Fact:
        queue = self._queues[queue_name]
        if not queue:
            queue.extend(pool)
            self.rng.shuffle(queue)
        return queue.pop()

    def _meaning(self) -> list[Message]:
        self.meanings += 1
        return meaning_turn(self._next("meaning", self.facts), self.rng)

    def _signature(self) -> list[Message]:
        self.signatures += 1
        make: Callable[[Fact, random.Random], list[Message]]
        make = two_turns if self.rng.random() < 0.15 else signature_turn
        return make(self._next("signature", self.callable_facts), self.rng)

    def next_turn(self) -> list[Message]:
        """The next question and answer (two of each for a follow-up)."""
        draw = self.rng.random()
        if draw < 0.75:
            return self._meaning()
        if draw < 0.91:
            return self._signature()
        return small_talk_turn(self.rng) if draw < 0.955 else unknown_turn(self.rng)

    def system_message(self) -> list[Message]:
        """Sometimes a system message, so that one in a real request does not put the model off."""
        if self.rng.random() < 0.15:
            return [{"role": "system", "content": self.rng.choice(SYSTEM_PROMPTS)}]
        return []
