"""``/admin/models``: load, list and unload models while serving."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from oxillama_torch.errors import CapacityError, RequestError
from oxillama_torch.server.admin.paths import inside, reading
from oxillama_torch.server.http import json_body
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.admin import LoadModelBody, UnloadModelBody

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of model administration."""
    routes = Blueprint("admin_models", __name__)

    @routes.get("/admin/models")
    def list_models() -> Response:
        config = services.config
        return jsonify(
            {
                "object": "list",
                "data": services.describe(),
                "max_models": config.max_models,
                "memory_budget_bytes": config.model_memory_bytes,
            }
        )

    @routes.post("/admin/models/load")
    def load() -> tuple[Response, int]:
        body = LoadModelBody.model_validate(json_body())
        body.check()
        path = inside(services.config.model_root, body.path, "model")
        try:
            with reading(path, body.path, "model"):
                return jsonify(services.load(body.id, path)), 202
        except CapacityError as error:
            raise RequestError(
                str(error), status=503, code="no_room", param="id", type="server_error"
            ) from error

    @routes.post("/admin/models/unload")
    def unload() -> Response:
        body = UnloadModelBody.model_validate(json_body())
        return jsonify(services.unload(body.id))

    return routes
