"""Marked text: what a user wrote stays recognisable while a template works on it.

Every special token holds one of a few *telling* characters, ``<`` for most models. Before a
template is rendered, each telling character in the user's text is replaced by a symbol that stands
for it and occurs nowhere else: its *mark*. Whatever the template cuts and joins, a special token
shows up in its output only if the template itself wrote the telling character. One character
stands for one, so lengths and slices are unaffected; and the operations that look at text (see
``Marks``) look through the marks: ``content.split('</think>')`` works on a marked content.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Marks"]

_ASKING = frozenset(["startswith", "endswith", "find", "rfind", "index", "rindex", "count"])
_SHORTENING = {
    "lstrip": lambda text, kept: text[len(text) - len(kept) :],
    "removeprefix": lambda text, kept: text[len(text) - len(kept) :],
    "rstrip": lambda text, kept: text[: len(kept)],
    "removesuffix": lambda text, kept: text[: len(kept)],
}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}


class Marks:
    """String operations that see through marks and keep them in what they return.

    Args:
        marks: mark -> the character it stands for; may be empty.
    """

    def __init__(self, marks: Mapping[str, str]) -> None:
        self.marks = dict(marks)
        self._table = str.maketrans(self.marks)

    def plain(self, value: Any) -> Any:
        """The value without marks: a string, or the strings of a list or the keys of a dict."""
        if not self._table:
            return value
        if type(value) is str:
            return value.translate(self._table)
        if type(value) in (list, tuple):
            return type(value)(self.plain(v) if type(v) is str else v for v in value)
        if type(value) is dict:
            return {self.plain(k): v for k, v in value.items()}
        return value

    def compare(self, operation: str, left: Any, right: Any) -> bool:
        """Compare without marks: ``eq``, ``ne``, ``in``, ``notin``."""
        return _COMPARE[operation](self.plain(left), self.plain(right))

    def call(self, text: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of ``str`` as if there were no marks; they stay in the result."""
        if "sep" in kwargs:
            args = (kwargs.pop("sep"), *args)
        plain, plain_args = self.plain(text), [self.plain(a) for a in args]
        asking = method in _ASKING or method.startswith("is")
        # Without an argument, the other methods look at white space and letter case only.
        if (plain == text and plain_args == list(args)) or not (args or asking):
            return getattr(text, method)(*args, **kwargs)
        if asking:
            return getattr(plain, method)(*plain_args)
        if method == "strip":
            return self.call(self.call(text, "lstrip", *args), "rstrip", *args)
        if method in _SHORTENING:
            return _SHORTENING[method](text, getattr(plain, method)(*plain_args))
        if method in ("partition", "rpartition"):
            return tuple(_cut(text, getattr(plain, method)(*plain_args), 0))
        if method in ("split", "rsplit") and plain_args[0] is not None:
            parts = getattr(plain, method)(*plain_args, **kwargs)
            return _cut(text, parts, len(plain_args[0]))
        if method == "replace" and plain_args[0] != "":
            parts = plain.split(plain_args[0], args[2] if len(args) > 2 else -1)
            return args[1].join(_cut(text, parts, len(plain_args[0])))
        return getattr(text, method)(*args, **kwargs)


def _cut(text: str, parts: list[str] | tuple[str, ...], gap: int) -> list[str]:
    """Cut ``text`` where its unmarked twin was cut into ``parts``, ``gap`` characters apart."""
    cut, start = [], 0
    for part in parts:
        cut.append(text[start : start + len(part)])
        start += len(part) + gap
    return cut
