"""Chat completions that were asked to be stored: list, get, messages, metadata, delete."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from flask import Blueprint, Response, current_app, jsonify, request
from sqlalchemy.orm import Session

from oxillama_torch.server.http import json_body
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.items import items_page
from oxillama_torch.server.schemas.chat import ChatBody
from oxillama_torch.server.schemas.conversations import MetadataChange
from oxillama_torch.server.store.owner import acting_for, current_owner
from oxillama_torch.server.store.paging import fetch, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import CompletionRow

__all__ = ["blueprint", "keep_completion"]

# Keys that could end the path they are put into are nobody's.
_METADATA = re.compile(r'metadata\[([^"\\\x00]{1,64})\]')


class _Form(Protocol):
    def completion(self) -> dict[str, Any]: ...


def keep_completion(
    form: _Form, body: ChatBody, messages: Sequence[Mapping[str, Any]]
) -> Callable[[], Future]:
    """What stores a completion once it has been generated."""
    store, owner = _store(), current_owner()

    def keep() -> Future:
        completion = {**form.completion(), "metadata": body.metadata or {}}
        stored = [
            {"id": f"{completion['id']}-{i}", "refusal": None, **message}
            for i, message in enumerate(messages)
        ]

        def write(session: Session) -> None:
            session.add(
                CompletionRow(
                    id=completion["id"],
                    created_at=completion["created"],
                    model=completion["model"],
                    data=completion,
                    messages=stored,
                )
            )

        with acting_for(owner):  # the thread that delivers streams is nobody's
            return store.submit(write)

    return keep


def blueprint(_services: Services) -> Blueprint:
    """Routes of stored chat completions."""
    routes = Blueprint("stored_completions", __name__)

    @routes.get("/v1/chat/completions")
    def list_completions() -> Response:
        query = list_query(order="asc")
        model = request.args.get("model")
        filters = {} if model is None else {"model": model.replace("\x00", "")}
        for name, value in request.args.items():
            if (match := _METADATA.fullmatch(name)) and "\x00" not in value:
                filters[f"metadata.{match[1]}"] = value
        with _store().read() as session:
            return jsonify(as_list(*page(session, CompletionRow, **query, **filters)))

    @routes.get("/v1/chat/completions/<completion_id>")
    def get(completion_id: str) -> Response:
        return jsonify(_find(completion_id).data)

    @routes.get("/v1/chat/completions/<completion_id>/messages")
    def messages(completion_id: str) -> Response:
        return jsonify(items_page(_find(completion_id).messages, **list_query(order="asc")))

    @routes.post("/v1/chat/completions/<completion_id>")
    def update(completion_id: str) -> Response:
        body = MetadataChange.model_validate(json_body())
        body.check()

        def write(session: Session) -> dict[str, Any]:
            row = fetch(session, CompletionRow, completion_id, "chat completion")
            row.data = {**row.data, "metadata": body.metadata or {}}
            return row.data

        return jsonify(_store().write(write))

    @routes.delete("/v1/chat/completions/<completion_id>")
    def delete(completion_id: str) -> Response:
        def write(session: Session) -> None:
            session.delete(fetch(session, CompletionRow, completion_id, "chat completion"))

        _store().write(write)
        deleted = {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
        return jsonify(deleted)

    return routes


def _store() -> Store:
    return current_app.extensions["store"]


def _find(completion_id: str) -> CompletionRow:
    with _store().read() as session:
        return fetch(session, CompletionRow, completion_id, "chat completion")
