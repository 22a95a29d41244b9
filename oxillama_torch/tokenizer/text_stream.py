"""One request's ids to the text its reader may see: detokenizing plus stop strings."""

from __future__ import annotations

from oxillama_torch.errors import RequestError
from oxillama_torch.tokenizer.detokenizer import Detokenizer
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["StopStrings", "TextStream"]


class _StopMatcher:
    """Follow one stop string through a text, character by character (Knuth, Morris and Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # characters of stop that the text ends with
        self._borders = [0]  # borders[i]: where to go on after a mismatch behind i + 1 characters
        for char in stop[1:]:
            self._borders.append(self._advance(self._borders[-1], char))

    def push(self, char: str) -> bool:
        """Take one character; True when the stop string is complete."""
        self.matched = self._advance(self.matched, char)
        return self.matched == len(self.stop)

    def _advance(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._borders[matched - 1]
        return matched + (self.stop[matched] == char)


class StopStrings:
    """Pass a text on up to the first stop string.

    The first is the one complete first, the longest of those that end together: a rule that does
    not depend on how the text is cut into tokens. Text that may be the beginning of a stop string
    is held back until it is known not to be. Time is linear in the text.

    Args:
        stop: stop strings; they are not part of the text.

    Attributes:
        finished: the stop string that ended the text, or None.

    Raises:
        RequestError: an empty stop string.
    """

    __slots__ = ("_first", "_held", "_matchers", "finished")

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        if not all(stop):
            raise RequestError("a stop string is empty", param="stop")
        self._matchers = [_StopMatcher(s) for s in sorted(set(stop), key=len, reverse=True)]
        self._first = frozenset(s[0] for s in stop)
        self._held = ""
        self.finished: str | None = None

    def push(self, new: str) -> str:
        """Take more text; return what may be shown now. After a stop string: nothing."""
        if self.finished is not None:
            return ""
        if not self._held and self._first.isdisjoint(new):
            return new
        held = self._held
        for i, char in enumerate(new):
            for matcher in self._matchers:
                if matcher.push(char) and self.finished is None:
                    self.finished = matcher.stop
            if self.finished is not None:
                seen = held + new[: i + 1]
                self._held = ""
                return seen.removesuffix(self.finished)
        text = held + new
        keep = max(matcher.matched for matcher in self._matchers)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text ends here, for now at least; return what was held back."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held


class TextStream:
    """Turn ids into text up to the first stop string, see ``StopStrings``.

    Args:
        tokenizer: the model's tokenizer.
        stop: stop strings; they are not part of the text.
        skip_special: leave special tokens out of the text.

    Attributes:
        finished: the stop string that ended the text, or None.
        push_all: takes several ids at once, where there are no stop strings.

    Raises:
        RequestError: an empty stop string.
    """

    __slots__ = ("_detokenizer", "_stop", "finished", "push_all")

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), skip_special: bool = True
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
        self._stop = StopStrings(stop) if stop else None
        self.finished: str | None = None
        self.push_all = self._detokenizer.push_all

    def push(self, token_id: int) -> str:
        """Take one id; return the text that may be shown now. After a stop string: nothing."""
        if self._stop is None:
            return self._detokenizer.push(token_id)
        if self.finished is not None:
            return ""
        text = self._stop.push(self._detokenizer.push(token_id))
        self.finished = self._stop.finished
        return text

    def flush(self) -> str:
        """End the text; return what was held back."""
        if self._stop is None:
            return self._detokenizer.flush()
        if self.finished is not None:
            return ""
        text = self._stop.push(self._detokenizer.flush())
        self.finished = self._stop.finished
        return text + self._stop.flush()
