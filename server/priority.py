"""How urgent the work of the current thread is, for everything that it submits to the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["BACKGROUND", "current_priority", "priority"]

#: Of work that nobody waits for, such as the lines of a batch.
BACKGROUND = 10

_priority: ContextVar[int] = ContextVar("priority", default=0)


def current_priority() -> int:
    """``GenerationRequest.priority``: lower runs first, 0 where nothing else was said."""
    return _priority.get()


@contextlib.contextmanager
def priority(value: int) -> Iterator[None]:
    """For the duration of a block, this thread's requests have another priority."""
    token = _priority.set(value)
    try:
        yield
    finally:
        _priority.reset(token)
