"""Where tables go."""

from __future__ import annotations

from rich.console import Console

__all__ = ["table_console"]

_PIPED_WIDTH = 160


def table_console() -> Console:
    """The terminal as wide as it is; a pipe or a file wide enough that no figure is cut."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(width=_PIPED_WIDTH, soft_wrap=True)
