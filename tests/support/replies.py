"""Replies for the tests of chat parsers: a vocabulary of bytes and markers, and what came out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from oxillama_torch.chat.grammar import Thinking
from oxillama_torch.chat.markers import Marker
from oxillama_torch.chat.parts import CallArguments, CallStarted, Text, Thought
from oxillama_torch.chat.reader import Reader
from oxillama_torch.chat.syntax import family_of
from oxillama_torch.chat.tool import Tool

TOOLS = (
    Tool(
        name="get_weather",
        description="Weather of a city",
        parameters={
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["city"],
        },
    ),
    Tool(name="get-time", parameters={"type": "object", "properties": {}}),
)

FIRST_MARKER = 256


class ByteVocabulary:
    """Each byte is a token, and so is each marker; ids as llguidance and the parsers want them."""

    def __init__(self, markers: tuple[str, ...], end: str = "<|eos|>") -> None:
        self.markers = {spelling: FIRST_MARKER + i for i, spelling in enumerate((end, *markers))}
        self.end_id = FIRST_MARKER
        by_length = sorted(self.markers, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")

    def special_id(self, spelling: str) -> int | None:
        return self.markers.get(spelling)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in self._pattern.split(text):
            ids += [self.markers[piece]] if piece in self.markers else piece.encode()
        return ids


class ByteTokenizer:
    """A ByteVocabulary as the detokenizer and the constraint compiler want it."""

    def __init__(self, vocabulary: ByteVocabulary) -> None:
        self._spellings = {i: spelling for spelling, i in vocabulary.markers.items()}
        self.vocab_size = FIRST_MARKER + len(self._spellings)
        self.eos_ids = frozenset([vocabulary.end_id])
        self.special_ids = frozenset(self._spellings)
        self.suppressed_ids: frozenset[int] = frozenset()
        self.adds_space = False
        # No token is a text by itself: all of them go through their bytes.
        self.texts = [None] * self.vocab_size

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < FIRST_MARKER:
            return bytes([token_id])
        return self._spellings[token_id].encode()

    def encode(self, text: str, **_: object) -> list[int]:
        return list(text.encode())


@dataclass
class Outcome:
    """A reply as its reader gets it."""

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def add(self, parts) -> None:
        for part in parts:
            if isinstance(part, Text):
                self.text += part.text
            elif isinstance(part, Thought):
                self.thought += part.text
            elif isinstance(part, CallStarted):
                assert part.call == len(self.calls)
                self.calls.append((part.name, ""))
                self.ids.append(part.id)
            else:
                assert isinstance(part, CallArguments)
                name, arguments = self.calls[part.call]
                assert part.call == len(self.calls) - 1
                self.calls[part.call] = (name, arguments + part.text)


def thinking_of(family, begin: str, end: str, *, opened: bool) -> Thinking:
    return Thinking(family.marker(begin), family.marker(end), opened)


def make_family(source: str, vocabulary: ByteVocabulary):
    return family_of(source)(source, vocabulary.special_id)


def read(family, reply: str, vocabulary, *, thinking=None, tools=TOOLS, step=None, stop=()):
    """Read a reply in pieces of ``step`` characters; a marker token comes in one piece."""
    counter = iter(range(1000))
    reader = Reader(
        lambda reader: family.read(reader, thinking, bool(tools)),
        tools={tool.name: tool for tool in tools},
        stop=stop,
        new_id=lambda: f"id-{next(counter)}",
    )
    outcome = Outcome()
    shown = {m.token_id for m in family.markers(bool(tools))}
    shown |= {m.token_id for m in (thinking.begin, thinking.end)} if thinking else set()
    for piece in vocabulary._pattern.split(reply):
        token_id = vocabulary.special_id(piece)
        if token_id is not None:
            pieces = [Marker(piece, token_id).text] if token_id in shown else []
        else:
            size = step or max(1, len(piece))
            pieces = [piece[i : i + size] for i in range(0, len(piece), size)]
        for text in pieces:
            outcome.add(reader.push(text))
    outcome.add(reader.end())
    return outcome
