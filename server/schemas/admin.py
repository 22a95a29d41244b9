"""Bodies of ``/admin`` routes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from oxillama_torch.errors import RequestError
from oxillama_torch.server.schemas.common import StrictModel

__all__ = ["KernelsBody", "LoadAdapterBody", "LoadModelBody", "UnloadModelBody"]

Name = Annotated[str, Field(min_length=1, max_length=128)]


class LoadAdapterBody(StrictModel):
    """``path`` is relative to the server's adapter root, or lies inside it."""

    name: Name
    path: Annotated[str, Field(min_length=1)]
    pinned: bool = False
    model: str | None = None


class LoadModelBody(StrictModel):
    """``path`` is relative to the server's model root, or lies inside it."""

    id: Name
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {"quant": ()}

    path: Annotated[str, Field(min_length=1)]

    def check(self) -> None:
        """Refuse what would be a different model from the file's."""
        if (self.model_extra or {}).get("quant") is not None:
            raise RequestError(
                "models are served with the types their files have.",
                code="unsupported_parameter",
                param="quant",
            )


class UnloadModelBody(StrictModel):
    id: Name


class KernelsBody(StrictModel):
    """Rules such as ``"attention=reference,quant_matmul.q4_k=triton"``; empty: choose freely."""

    kernels: str
