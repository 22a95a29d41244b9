"""Cursor lists: their query parameters and their shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from flask import request
from pydantic import BaseModel, Field

from oxillama_torch.errors import RequestError
from oxillama_torch.server.store.tables import Row

__all__ = ["as_list", "list_query"]


# What is no id is nobody's, and gets the answer of one that is not there.
_Cursor = Annotated[str, Field(json_schema_extra={"pattern": "^[A-Za-z0-9_.:-]{0,256}$"})]


class _Query(BaseModel):
    limit: Annotated[int, Field(ge=1)] | None = None
    order: Literal["asc", "desc"] | None = None
    after: _Cursor | None = None
    before: _Cursor | None = None


def list_query(default: int = 20, most: int = 100, order: str = "desc") -> dict[str, Any]:
    """Arguments of ``store.paging.page`` from the URL's query.

    Args:
        default, most: of ``limit``.
        order: where the query names none.

    Raises:
        RequestError, ValidationError: names the parameter.
    """
    query = _Query.model_validate(request.args.to_dict())
    limit = query.limit or default
    if limit > most:
        raise RequestError(f"'limit' must be at most {most}.", param="limit")
    cursors = {"after": query.after or None, "before": query.before or None}
    return {"limit": limit, "order": query.order or order, **cursors}


def as_list(rows: Sequence[Row], has_more: bool) -> dict:
    """The list object of a page of rows."""
    data = [row.data for row in rows]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
