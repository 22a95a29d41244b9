"""``/v1/assistants``."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from oxillama_torch.server.assistants.objects import new_assistant
from oxillama_torch.server.assistants.records import add
from oxillama_torch.server.http import parsed
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.assistants import AssistantBody, AssistantChanges
from oxillama_torch.server.store.paging import fetch, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_assistants import AssistantRow

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of assistants."""
    routes = Blueprint("assistants", __name__)

    @routes.post("/v1/assistants")
    def create() -> Response:
        body = parsed(AssistantBody)
        services.find(body.model)
        assistant = new_assistant(body.fields())
        _store().write(lambda session: add(session, AssistantRow, assistant))
        return jsonify(assistant)

    @routes.get("/v1/assistants")
    def list_assistants() -> Response:
        with _store().read() as session:
            return jsonify(as_list(*page(session, AssistantRow, **list_query())))

    _add_single(routes, services)
    return routes


def _add_single(routes: Blueprint, services: Services) -> None:
    @routes.get("/v1/assistants/<assistant_id>")
    def get(assistant_id: str) -> Response:
        with _store().read() as session:
            return jsonify(fetch(session, AssistantRow, assistant_id, "assistant").data)

    @routes.post("/v1/assistants/<assistant_id>")
    def modify(assistant_id: str) -> Response:
        changes = parsed(AssistantChanges).given()
        if "model" in changes:
            services.find(changes["model"])

        def change(session) -> dict:
            row = fetch(session, AssistantRow, assistant_id, "assistant")
            row.data = {**row.data, **changes}
            return row.data

        return jsonify(_store().write(change))

    @routes.delete("/v1/assistants/<assistant_id>")
    def delete(assistant_id: str) -> Response:
        _store().write(
            lambda session: session.delete(fetch(session, AssistantRow, assistant_id, "assistant"))
        )
        return jsonify({"id": assistant_id, "object": "assistant.deleted", "deleted": True})


def _store() -> Store:
    return current_app.extensions["store"]
