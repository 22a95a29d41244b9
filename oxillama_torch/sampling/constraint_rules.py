"""Rules of a grammar, and what can be said of them without a text.

llguidance cuts a text into lexemes, the longest that can stand at a place, before it looks at
rules. Whether a rule may be one lexeme without changing what the grammar means is decided here.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter

__all__ = [
    "Char",
    "Item",
    "Rules",
    "has_tokens",
    "left_recursive",
    "lexemes",
    "recursive",
    "references",
]


@dataclass(frozen=True, slots=True)
class Char:
    """One character out of a set.

    Args:
        lark: a string or an expression of Lark.
        ranges: first and last code points.
    """

    lark: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Item:
    """A part of a rule: one of ``text``, ``token``, ``rule`` and ``group``.

    Args:
        text: characters one after the other.
        token: the name of a token of the vocabulary.
        rule: the name of a rule.
        group: alternatives.
        least, most: how often it comes; None: without end.
    """

    text: list[Char] | None = None
    token: str | None = None
    rule: str | None = None
    group: list[list[Item]] = field(default_factory=list)
    least: int = 1
    most: int | None = 1


#: Alternatives by name.
Rules = dict[str, list[list[Item]]]


def references(alternatives: list[list[Item]]) -> Iterator[str]:
    """Names of the rules that are used, one by one."""
    for item in (item for sequence in alternatives for item in sequence):
        if item.rule is not None:
            yield item.rule
        yield from references(item.group)


def has_tokens(alternatives: list[list[Item]]) -> bool:
    """Whether a token of the vocabulary is named."""
    items = (item for sequence in alternatives for item in sequence)
    return any(item.token is not None or has_tokens(item.group) for item in items)


def recursive(rules: Rules) -> set[str]:
    """Rules that use themselves, directly or by way of others, and those that use such rules."""
    return _unsettled({name: set(references(body)) for name, body in rules.items()})


def left_recursive(rules: Rules) -> str | None:
    """A rule that may begin with itself, if there is one."""
    empty = _may_be_empty(rules)

    def leftmost(alternatives: list[list[Item]]) -> Iterator[str]:
        for sequence in alternatives:
            for item in sequence:
                if item.rule is not None:
                    yield item.rule
                yield from leftmost(item.group)
                if not _is_empty(item, empty):
                    break

    first = {name: set(leftmost(body)) for name, body in rules.items()}
    left = _unsettled(first)
    if not left:
        return None
    # What is left leads into a cycle: follow it until a rule comes up again.
    name, passed = min(left), set()
    while name not in passed:
        passed.add(name)
        name = min(first[name] & left)
    return name


def lexemes(rules: Rules) -> set[str]:
    """Rules that may be lexemes: what the grammar means stays the same.

    So it is if the first character of a lexeme tells which of them it is, and if none can be longer
    by a character that may also come after it. Otherwise no rule of the grammar is one.
    """
    loops, empty = recursive(rules), _may_be_empty(rules)
    found = {n for n, body in rules.items() if n not in loops | empty and not has_tokens(body)}
    return found if _Reading(rules, found, empty).is_exact() else set()


def _unsettled(uses: dict[str, set[str]]) -> set[str]:
    """What stays when names that use none of those left are taken away again and again."""
    sorter, settled = TopologicalSorter(uses), set()
    with contextlib.suppress(CycleError):  # it gives what comes before the cycles all the same
        sorter.prepare()
    while ready := sorter.get_ready():
        settled.update(ready)
        sorter.done(*ready)
    return uses.keys() - settled


def _may_be_empty(rules: Rules) -> set[str]:
    empty: set[str] = set()
    size = -1
    while size != len(empty):
        size = len(empty)
        empty |= {name for name, body in rules.items() if _is_empty(Item(group=body), empty)}
    return empty


def _is_empty(item: Item, empty: set[str]) -> bool:
    """Whether an item may be nothing at all, given the rules that may be."""
    if item.least == 0 or item.rule in empty or item.text == []:
        return True
    return any(all(_is_empty(part, empty) for part in sequence) for sequence in item.group)


@dataclass(slots=True)
class _Shape:
    """Characters as bits: those a text begins with, may go on with once it could end, and has."""

    first: int = 0
    longer: int = 0
    all: int = 0


class _Reading:
    """How a grammar's texts are cut into lexemes, given the rules that are to be some."""

    def __init__(self, rules: Rules, found: set[str], empty: set[str]) -> None:
        self._rules, self._found, self._empty = rules, found, empty
        ranges = {r for body in rules.values() for char in _chars(body) for r in char.ranges}
        self._bounds = sorted({low for low, _ in ranges} | {high + 1 for _, high in ranges})
        self._shapes: dict[str, _Shape] = {}
        self._first = dict.fromkeys(rules, 0)
        self._follow = dict.fromkeys(rules, 0)
        #: Lexemes of several characters by what they are: shape, and what may come after.
        self._long: dict[object, tuple[_Shape, int]] = {}
        self._single = 0

    def is_exact(self) -> bool:
        """Whether the longest lexeme is always the right one."""
        outer = [name for name in self._rules if name not in self._found]
        before: object = None
        while before != (before := (dict(self._first), dict(self._follow), dict(self._long))):
            for name in outer:
                self._first[name] = self._walk(self._rules[name], self._follow[name])
        seen = self._single
        for shape, follow in self._long.values():
            if shape.first & seen or shape.longer & follow:
                return False
            seen |= shape.first
        return True

    def _walk(self, alternatives: list[list[Item]], follow: int) -> int:
        """Note what comes after each part. Returns: characters that a text begins with."""
        first = 0
        for sequence in alternatives:
            begin, after = 0, follow
            for item in reversed(sequence):
                begins = self._item(item, after)
                if item.most is None or item.most > 1:
                    begins |= self._item(item, after | begins)
                may_be_nothing = _is_empty(item, self._empty)
                begin = begins | begin if may_be_nothing else begins
                after = begins | after if may_be_nothing else begins
            first |= begin
        return first

    def _item(self, item: Item, after: int) -> int:
        if item.rule is not None and item.rule not in self._found:
            self._follow[item.rule] |= after
            return self._first[item.rule]
        if item.rule is None and item.text is None:
            return self._walk(item.group, after)
        if item.text is not None and len(item.text) < 2:
            self._single |= self._shape(item).first
            return self._shape(item).first
        key = item.rule or tuple(item.text or ())
        shape = self._rule_shape(item.rule) if item.rule else self._texts(item.text or [])
        self._long[key] = shape, self._long.get(key, (shape, 0))[1] | after
        return shape.first

    def _rule_shape(self, name: str) -> _Shape:
        if name not in self._shapes:
            self._shapes[name] = self._either(self._rules[name])
        return self._shapes[name]

    def _either(self, alternatives: list[list[Item]]) -> _Shape:
        whole = _Shape()
        for shape in map(self._sequence, alternatives):
            if whole.first & shape.first:
                # One may be the beginning of the other: nothing more precise is said.
                whole.longer |= whole.all | shape.all
            whole.first |= shape.first
            whole.longer |= shape.longer
            whole.all |= shape.all
        return whole

    def _sequence(self, items: list[Item]) -> _Shape:
        whole = _Shape()
        may_be_empty = True
        for item in items:
            shape = self._shape(item)
            unclear = whole.longer & shape.first
            if may_be_empty:
                whole.first |= shape.first
            keeps = whole.longer | shape.first if _is_empty(item, self._empty) else 0
            whole.all |= shape.all
            whole.longer = whole.all if unclear else keeps | shape.longer
            may_be_empty &= _is_empty(item, self._empty)
        return whole

    def _shape(self, item: Item) -> _Shape:
        if item.rule is not None:
            shape = self._rule_shape(item.rule)
        else:
            shape = self._either(item.group) if item.text is None else self._texts(item.text)
        if item.most == 1 or item.most == 0:
            return shape if item.most else _Shape()
        unclear = shape.longer & shape.first
        longer = shape.all if unclear else shape.longer
        if item.most != item.least:
            longer |= shape.first
        return _Shape(shape.first, longer, shape.all)

    def _texts(self, chars: list[Char]) -> _Shape:
        bits = [self._bits(char) for char in chars]
        union = 0
        for part in bits:
            union |= part
        return _Shape(bits[0] if bits else 0, 0, union)

    def _bits(self, char: Char) -> int:
        """A set of characters; those that no range tells apart share a bit."""
        bits = 0
        for low, high in char.ranges:
            start = bisect.bisect_left(self._bounds, low)
            bits |= (1 << bisect.bisect_left(self._bounds, high + 1)) - (1 << start)
        return bits


def _chars(alternatives: list[list[Item]]) -> Iterator[Char]:
    for item in (item for sequence in alternatives for item in sequence):
        yield from item.text or ()
        yield from _chars(item.group)
