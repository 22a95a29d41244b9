"""``/v1/conversations``: items that responses build on and add to."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from flask import Blueprint, Response, current_app, jsonify
from sqlalchemy import delete
from sqlalchemy.orm import Session

from oxillama_torch.server.http import json_body
from oxillama_torch.server.listing import list_query
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.items import item_id, list_of, parse_items
from oxillama_torch.server.responses.keeping import add_items, find_item
from oxillama_torch.server.schemas.common import StrictModel
from oxillama_torch.server.schemas.conversations import ConversationBody, ItemsBody, MetadataChange
from oxillama_torch.server.store.paging import fetch, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ConversationRow, ItemRow

__all__ = ["blueprint"]

Body = TypeVar("Body", bound=StrictModel)


def blueprint(_services: Services) -> Blueprint:
    """Routes of conversations and their items."""
    routes = Blueprint("conversations", __name__)

    @routes.post("/v1/conversations")
    def create() -> Response:
        return jsonify(_create(_body(ConversationBody)))

    @routes.get("/v1/conversations/<conversation_id>")
    def get(conversation_id: str) -> Response:
        with _store().read() as session:
            return jsonify(_find(session, conversation_id).data)

    @routes.post("/v1/conversations/<conversation_id>")
    def update(conversation_id: str) -> Response:
        metadata = _body(MetadataChange).metadata or {}

        def write(session: Session) -> dict:
            row = _find(session, conversation_id)
            row.data = {**row.data, "metadata": metadata}
            return row.data

        return jsonify(_store().write(write))

    @routes.delete("/v1/conversations/<conversation_id>")
    def remove(conversation_id: str) -> Response:
        def write(session: Session) -> None:
            session.delete(_find(session, conversation_id))
            session.execute(delete(ItemRow).where(ItemRow.parent_id == conversation_id))

        _store().write(write)
        deleted = {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
        return jsonify(deleted)

    @routes.post("/v1/conversations/<conversation_id>/items")
    def add(conversation_id: str) -> Response:
        items = _parse(_body(ItemsBody).items)

        def write(session: Session) -> None:
            _find(session, conversation_id)
            add_items(session, conversation_id, items)

        _store().write(write)
        return jsonify(list_of(items, False))

    @routes.get("/v1/conversations/<conversation_id>/items")
    def list_items(conversation_id: str) -> Response:
        with _store().read() as session:
            _find(session, conversation_id)
            rows, more = page(session, ItemRow, parent_id=conversation_id, **list_query())
        return jsonify(list_of([row.data for row in rows], more))

    @routes.get("/v1/conversations/<conversation_id>/items/<item>")
    def get_item(conversation_id: str, item: str) -> Response:
        with _store().read() as session:
            return jsonify(_find_item(session, conversation_id, item).data)

    @routes.delete("/v1/conversations/<conversation_id>/items/<item>")
    def remove_item(conversation_id: str, item: str) -> Response:
        def write(session: Session) -> dict:
            session.delete(_find_item(session, conversation_id, item))
            return _find(session, conversation_id).data

        return jsonify(_store().write(write))

    return routes


def _store() -> Store:
    return current_app.extensions["store"]


def _body(kind: type[Body]) -> Body:
    body = kind.model_validate(json_body())
    body.check()
    return body


def _find(session: Session, conversation_id: str) -> ConversationRow:
    return fetch(session, ConversationRow, conversation_id, "conversation")


def _find_item(session: Session, conversation_id: str, item: str) -> ItemRow:
    _find(session, conversation_id)
    return fetch(session, ItemRow, item, "item", parent_id=conversation_id)


def _parse(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with _store().read() as session:
        return parse_items(items, "items", lambda name: find_item(session, name))


def _create(body: ConversationBody) -> dict[str, Any]:
    items = _parse(body.items or [])
    conversation = {
        "id": item_id("conv"),
        "object": "conversation",
        "created_at": int(time.time()),
        "metadata": body.metadata or {},
    }

    def write(session: Session) -> None:
        created = conversation["created_at"]
        row = ConversationRow(id=conversation["id"], created_at=created, data=conversation)
        session.add(row)
        session.flush()
        add_items(session, conversation["id"], items)

    _store().write(write)
    return conversation
