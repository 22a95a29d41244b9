"""Bodies of ``POST /v1/batches`` and of OxiLLaMa's ``POST /v1/batch_jobs``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from oxillama_torch.errors import RequestError
from oxillama_torch.server.schemas.common import StrictModel, given
from oxillama_torch.server.schemas.lists import Several

__all__ = ["BatchBody", "BatchJobBody", "ExpiresAfter", "Metadata"]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]

_WINDOW = re.compile(r"([1-9][0-9]{0,4})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class ExpiresAfter(BaseModel):
    """When a file goes by itself."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


class _Batch(StrictModel):
    endpoint: Endpoint
    completion_window: Annotated[
        str, Field(json_schema_extra={"pattern": f"^{_WINDOW.pattern}$"})
    ] = "24h"
    metadata: Metadata | None = None

    def window(self) -> tuple[str, int]:
        """The completion window as written and in seconds; OpenAI knows ``24h`` alone."""
        match = _WINDOW.fullmatch(self.completion_window)
        if match is None:
            raise RequestError(
                "'completion_window' must be such as '24h'.", param="completion_window"
            )
        return self.completion_window, int(match[1]) * _SECONDS[match[2]]


class BatchBody(_Batch):
    """``requests`` is OxiLLaMa's form: the lines themselves in place of a file of them."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [given("input_file_id", "string"), given("requests", "array")]}
    )

    input_file_id: str | None = None
    requests: Several[dict[str, Any]] | None = None
    output_expires_after: ExpiresAfter | None = None

    def inline(self) -> bytes | None:
        """The requests as lines of a file."""
        if (self.requests is None) == (self.input_file_id is None):
            raise RequestError(
                "'input_file_id' is needed.",
                code="missing_required_parameter",
                param="input_file_id",
            )
        if self.requests is None:
            return None
        return b"".join(orjson.dumps(request) + b"\n" for request in self.requests)


class BatchJobBody(_Batch):
    """``input_jsonl`` is the text of the file."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                given("input_file_id", "string", minLength=1),
                given("input_jsonl", "string", minLength=1),
            ]
        }
    )

    input_jsonl: str = ""
    input_file_id: str | None = None

    def inline(self) -> bytes | None:
        """The lines, when they are in the body."""
        if self.input_jsonl:
            return self.input_jsonl.encode()
        if not self.input_file_id:
            raise RequestError(
                "'input_jsonl' is needed.", code="missing_required_parameter", param="input_jsonl"
            )
        return None
