"""What a model may call: plain data that every front door shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Tool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask the client to call.

    Args:
        name: 1 to 64 characters of ``[a-zA-Z0-9_-]``.
        description: for the model; may be empty.
        parameters: JSON schema of the arguments, an object; None: any object.
        strict: the arguments always follow the schema, also where the model chose to call.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False
