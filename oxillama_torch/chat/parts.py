"""What a reply is made of, in the order in which it comes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CallArguments", "CallStarted", "Part", "Text", "Thought"]


# Not frozen, which would quadruple its cost: one is made per token.
@dataclass(slots=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A tool call: its number in this reply, from 0, its id, and the tool's name."""

    call: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A fragment of a call's arguments; all of them together are one JSON text."""

    call: int
    text: str


Part = Text | Thought | CallStarted | CallArguments
