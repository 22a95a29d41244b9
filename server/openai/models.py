"""``GET /v1/models``."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(service: Service) -> Blueprint:
    """Routes of the model list. Ids may contain slashes."""
    routes = Blueprint("models", __name__)
    model = {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "oxillama-torch",
    }

    @routes.get("/v1/models")
    def list_models() -> Response:
        return jsonify({"object": "list", "data": [model]})

    @routes.get("/v1/models/<path:model_id>")
    def get_model(model_id: str) -> Response:
        service.require_model(model_id)
        return jsonify(model)

    return routes
