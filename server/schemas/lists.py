"""Lists in request bodies: their check ends at the first item that is wrong.

Otherwise pydantic describes every wrong item, for every type that it might have been: seconds for a
body of a few hundred thousand, in which no other thread gets its turn.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import Field

__all__ = ["MAX_FEW", "Few", "Many", "Several"]

T = TypeVar("T")

#: Of what costs more than a number does: messages, prompts, items. OpenAI's limit of messages.
MAX_FEW = 2048

Many = Annotated[list[T], Field(fail_fast=True)]
Several = Annotated[Many[T], Field(min_length=1)]
Few = Annotated[list[T], Field(max_length=MAX_FEW, fail_fast=True)]
