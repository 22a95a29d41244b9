"""``GET /v1/models``."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from oxillama_torch.server.pool import Services
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of the model list. Ids may contain slashes."""
    routes = Blueprint("models", __name__)

    @routes.get("/v1/models")
    def list_models() -> Response:
        models = [
            _describe(service, name)
            for service in services.ready()
            for name in (service.model_id, *service.engine.adapters.names())
        ]
        return jsonify({"object": "list", "data": models})

    @routes.get("/v1/models/<path:model_id>")
    def get_model(model_id: str) -> Response:
        service, _ = services.find(model_id)
        return jsonify(_describe(service, model_id))

    return routes


def _describe(service: Service, name: str) -> dict:
    """The model, or an adapter, which names its parent as vLLM does."""
    model = {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "oxillama-torch",
    }
    return model if name == service.model_id else {**model, "parent": service.model_id}
