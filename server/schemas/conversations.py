"""Bodies of ``/v1/conversations``."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from oxillama_torch.errors import RequestError
from oxillama_torch.server.responses.items import Item
from oxillama_torch.server.schemas.batches import Metadata
from oxillama_torch.server.schemas.common import StrictModel

__all__ = ["ConversationBody", "ItemsBody", "MetadataChange"]

Items = Annotated[list[Item], Field(max_length=20)]


class _KnownFields(StrictModel):
    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})

    def check(self) -> None:
        """Refuse fields that nothing reads.

        Raises:
            RequestError: names the field.
        """
        for name in sorted(self.model_extra or ()):
            raise RequestError(
                f"Unknown parameter: '{name[:64]}'.", code="unknown_parameter", param=name[:64]
            )


class ConversationBody(_KnownFields):
    items: Items | None = None
    metadata: Metadata | None = None


class MetadataChange(_KnownFields):
    metadata: Metadata | None


class ItemsBody(_KnownFields):
    items: Items
