"""``/v1/threads`` and their messages."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify, request
from sqlalchemy.orm import Session

from oxillama_torch.server.assistants.objects import new_thread
from oxillama_torch.server.assistants.records import (
    add,
    change_metadata,
    delete_thread,
    expire_runs,
    find_thread,
    new_messages,
    require_idle,
    write_messages,
)
from oxillama_torch.server.http import parsed
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.assistants import MessageBody, MetadataBody, ThreadBody
from oxillama_torch.server.store.paging import fetch, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_assistants import MessageRow, ThreadRow

__all__ = ["blueprint"]

# Not /v1/threads/runs, which is a route of its own.
_THREAD = "/v1/threads/<string(minlength=5):thread_id>"


def blueprint(services: Services) -> Blueprint:
    """Routes of threads and messages."""
    routes = Blueprint("threads", __name__)
    _add_threads(routes)
    _add_messages(routes)
    return routes


def _add_threads(routes: Blueprint) -> None:
    @routes.post("/v1/threads")
    def create() -> Response:
        chunked = "Transfer-Encoding" in request.headers
        body = parsed(ThreadBody) if request.content_length or chunked else ThreadBody()
        thread = new_thread(body.metadata or {})
        messages = new_messages(thread["id"], body.messages)

        def write(session: Session) -> None:
            add(session, ThreadRow, thread)
            write_messages(session, messages)

        _store().write(write)
        return jsonify(thread)

    @routes.get(_THREAD)
    def get(thread_id: str) -> Response:
        with _store().read() as session:
            return jsonify(find_thread(session, thread_id).data)

    @routes.post(_THREAD)
    def modify(thread_id: str) -> Response:
        body = parsed(MetadataBody)
        return jsonify(
            _store().write(lambda session: change_metadata(find_thread(session, thread_id), body))
        )

    @routes.delete(_THREAD)
    def delete(thread_id: str) -> Response:
        _store().write(lambda session: delete_thread(session, thread_id))
        return jsonify({"id": thread_id, "object": "thread.deleted", "deleted": True})


def _add_messages(routes: Blueprint) -> None:
    @routes.post("/v1/threads/<thread_id>/messages")
    def create_message(thread_id: str) -> Response:
        body = parsed(MessageBody)
        messages = new_messages(thread_id, [body])
        expire_runs(_store())

        def write(session: Session) -> None:
            require_idle(session, thread_id, "Can't add messages to")
            write_messages(session, messages)

        _store().write(write)
        return jsonify(messages[0])

    @routes.get("/v1/threads/<thread_id>/messages")
    def list_messages(thread_id: str) -> Response:
        run_id = request.args.get("run_id")
        filters = {"thread_id": thread_id, **({} if run_id is None else {"run_id": run_id})}
        with _store().read() as session:
            find_thread(session, thread_id)
            return jsonify(as_list(*page(session, MessageRow, **list_query(), **filters)))

    @routes.get("/v1/threads/<thread_id>/messages/<message_id>")
    def get_message(thread_id: str, message_id: str) -> Response:
        with _store().read() as session:
            return jsonify(_find(session, thread_id, message_id).data)

    @routes.post("/v1/threads/<thread_id>/messages/<message_id>")
    def modify_message(thread_id: str, message_id: str) -> Response:
        body = parsed(MetadataBody)
        return jsonify(
            _store().write(
                lambda session: change_metadata(_find(session, thread_id, message_id), body)
            )
        )

    @routes.delete("/v1/threads/<thread_id>/messages/<message_id>")
    def delete_message(thread_id: str, message_id: str) -> Response:
        _store().write(lambda session: session.delete(_find(session, thread_id, message_id)))
        return jsonify({"id": message_id, "object": "thread.message.deleted", "deleted": True})


def _store() -> Store:
    return current_app.extensions["store"]


def _find(session: Session, thread_id: str, message_id: str) -> MessageRow:
    find_thread(session, thread_id)
    return fetch(session, MessageRow, message_id, "message", thread_id=thread_id)
