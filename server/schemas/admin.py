"""Body of ``POST /admin/loras``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from oxillama_torch.server.schemas.common import StrictModel

__all__ = ["LoadAdapterBody"]


class LoadAdapterBody(StrictModel):
    """``path`` is relative to the server's adapter root, or lies inside it."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    path: Annotated[str, Field(min_length=1)]
    pinned: bool = False
    model: str | None = None
