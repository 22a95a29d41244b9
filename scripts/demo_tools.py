"""Synthetic tool calls in Hermes form for the demo model: pick a tool, copy its arguments, use what
it returns.

All names, sentences and schemas are our own. One conversation holds two to four tools in its
prompt, of which one fits the request; the arguments stand word for word in the user's text, so that
copying is what is learned.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from demo_corpus import words

CITIES = words(
    """
    Paris London Berlin Madrid Rome Vienna Prague Oslo Helsinki Dublin Lisbon Athens Warsaw
    Zurich Geneva Hamburg Munich Tokyo Osaka Seoul Beijing Shanghai Singapore Bangkok Delhi
    Mumbai Sydney Melbourne Auckland Cairo Nairobi Lagos Boston Chicago Denver Seattle Dallas
    Austin Miami Atlanta Toronto Montreal Vancouver Lima Bogota Santiago
    """
)
NAMES = words("Anna Ben Clara David Emma Felix Grace Henry Ida Jack Lena Max Nora Tom")
TOPICS = (
    "reading a file", "sorting a list", "parsing JSON", "regular expressions", "date formatting",
    "threads", "virtual environments", "context managers", "string formatting", "type hints",
    "generators", "decorators", "sockets", "logging", "unit tests", "dictionaries",
    "async functions", "command line arguments", "random numbers",
)  # fmt: skip
LANGUAGES = ("German", "French", "Spanish", "Italian", "Dutch", "Polish", "Japanese", "Portuguese")
PHRASES = (
    "good morning",
    "thank you",
    "see you soon",
    "where is the station",
    "I like tea",
    "how much is it",
)
CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "SEK")
FILES = (
    "notes.txt",
    "report.md",
    "data.csv",
    "main.py",
    "config.ini",
    "todo.txt",
    "setup.cfg",
    "log.txt",
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy")


@dataclass(frozen=True)
class Tool:
    """A tool: its parameters as name -> JSON type, ways to ask for it, what it returns and how that
    is told."""

    name: str
    description: str
    parameters: dict[str, str]
    requests: tuple[str, ...]
    result: str
    sentence: str

    def schema(self) -> dict:
        """The tool as the OpenAI API writes it in ``tools``."""
        properties = {name: {"type": kind} for name, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS = (
    Tool("get_weather", "Get the current weather of a city.", {"city": "string"},
         ("What is the weather in {city}?", "How is the weather in {city} today?",
          "Weather in {city}?", "Is it raining in {city}?", "Tell me the weather in {city}.",
          "What's the weather like in {city}?"),
         '{{"city": "{city}", "temperature": {degrees}, "sky": "{sky}"}}',
         "It is {sky} in {city}, at {degrees} degrees."),
    Tool("get_time", "Get the local time of a city.", {"city": "string"},
         ("What time is it in {city}?", "Tell me the time in {city}.",
          "What is the local time in {city}?"),
         '{{"city": "{city}", "time": "{hour}:{minute}"}}', "It is {hour}:{minute} in {city}."),
    Tool("calculator", "Evaluate an arithmetic expression.", {"expression": "string"},
         ("What is {expression}?", "Calculate {expression}.",
          "How much is {expression}?", "Compute {expression}"),
         '{{"result": {value}}}', "The result is {value}."),
    Tool("search_docs", "Search the documentation.", {"query": "string"},
         ("Search the docs for {query}.", "Find documentation about {query}.",
          "Look up {query} in the docs."),
         '{{"pages": {count}}}', "I found {count} pages about {query}."),
    Tool("convert_currency", "Convert an amount of money.",
         {"amount": "number", "source": "string", "target": "string"},
         ("Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?"),
         '{{"amount": {value}}}', "{amount} {source} are {value} {target}."),
    Tool("translate", "Translate a text.", {"text": "string", "language": "string"},
         ('Translate "{text}" to {language}.', 'How do you say "{text}" in {language}?'),
         '{{"status": "done"}}', "The translation to {language} is done."),
    Tool("set_timer", "Start a timer.", {"minutes": "integer"},
         ("Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.",
          "Timer: {minutes} minutes"),
         '{{"status": "started"}}', "The timer for {minutes} minutes is running."),
    Tool("read_file", "Read a text file.", {"path": "string"},
         ("Read {path}.", "Open the file {path}.", "What is in {path}?", "Show me {path}"),
         '{{"lines": {count}}}', "The file {path} has {count} lines."),
    Tool("send_email", "Send an email.", {"to": "string", "subject": "string"},
         ("Send an email to {to} about {subject}.", "Write to {to} about {subject}."),
         '{{"status": "sent"}}', "The email to {to} has been sent."),
)  # fmt: skip


def _slots(rng: random.Random) -> dict[str, object]:
    """A value for every slot that a template may name."""
    left, right = rng.randint(2, 999), rng.randint(2, 99)
    source, target = rng.sample(CURRENCIES, 2)
    return {
        "city": rng.choice(CITIES), "degrees": rng.randint(-9, 38), "sky": rng.choice(SKIES),
        "hour": f"{rng.randint(0, 23):02d}", "minute": f"{rng.randint(0, 59):02d}",
        "expression": f"{left} {rng.choice('+-*/')} {right}", "value": rng.randint(1, 9999),
        "query": rng.choice(TOPICS), "count": rng.randint(2, 300), "amount": rng.randint(1, 999),
        "source": source, "target": target, "text": rng.choice(PHRASES),
        "language": rng.choice(LANGUAGES), "minutes": rng.randint(1, 90), "path": rng.choice(FILES),
        "to": rng.choice(NAMES), "subject": rng.choice(TOPICS),
    }  # fmt: skip


def tool_conversation(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """One ``(messages, tools)``: a request, the call, the tool's answer and the sentence that uses
    it."""
    chosen = rng.choice(TOOLS)
    others = rng.sample([tool for tool in TOOLS if tool is not chosen], rng.randint(0, 2))
    offered = [chosen, *others]
    rng.shuffle(offered)
    slots = _slots(rng)
    arguments = {name: slots[name] for name in chosen.parameters}
    call = {"type": "function", "function": {"name": chosen.name, "arguments": arguments}}
    result = chosen.result.format(**slots)
    json.loads(result)  # a template that is not JSON would teach nonsense
    messages = [
        {"role": "user", "content": rng.choice(chosen.requests).format(**slots)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": chosen.sentence.format(**slots)},
    ]
    return messages, [tool.schema() for tool in offered]
