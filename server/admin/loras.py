"""``/admin/loras``: load, list and drop adapters while serving.

Requests under way keep the version they began with.
"""

from __future__ import annotations

from pathlib import Path

from flask import Blueprint, Response, jsonify

from oxillama_torch.errors import GGUFError, RequestError
from oxillama_torch.server.http import json_body
from oxillama_torch.server.schemas.admin import LoadAdapterBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(service: Service) -> Blueprint:
    """Routes of adapter administration."""
    routes = Blueprint("loras", __name__)
    adapters = service.engine.adapters

    @routes.get("/admin/loras")
    def list_loras() -> Response:
        return jsonify(
            {"object": "list", "data": [_describe(service, n) for n in adapters.names()]}
        )

    @routes.post("/admin/loras")
    def load() -> tuple[Response, int]:
        body = LoadAdapterBody.model_validate(json_body())
        if body.name == service.model_id:
            raise RequestError("an adapter cannot have the model's name", param="name")
        path = _inside(service.config.adapter_root, body.path)
        try:
            adapters.load(body.name, path, pinned=body.pinned)
        except (GGUFError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise RequestError(f"cannot read the adapter: {reason}", param="path") from error
        return jsonify(_describe(service, body.name)), 201

    @routes.delete("/admin/loras/<path:name>")
    def drop(name: str) -> Response:
        adapters.drop(name)
        return jsonify({"id": name, "object": "lora", "deleted": True})

    return routes


def _describe(service: Service, name: str) -> dict:
    adapter = service.engine.adapters.get(name)
    return {
        "id": name,
        "name": name,
        "object": "lora",
        "parent": service.model_id,
        "digest": adapter.digest,
        "ranks": adapter.adapter.ranks,
        "bytes": adapter.nbytes,
    }


def _inside(root: Path | None, path: str) -> Path:
    """The file meant by ``path``; links are followed before it is judged."""
    if root is None:
        raise _forbidden("this server has no adapter root: adapters are loaded at start only")
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise _forbidden("the path is outside of the adapter root")
    return resolved


def _forbidden(message: str) -> RequestError:
    return RequestError(
        message, status=403, code="forbidden", param="path", type="permission_error"
    )
