"""``/admin/loras``: load, list and drop adapters while serving.

Requests under way keep the version they began with.
"""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request

from oxillama_torch.errors import RequestError
from oxillama_torch.lora.peft_folder import prepare_reading
from oxillama_torch.lora.registry import AdapterFacts
from oxillama_torch.server.admin.paths import inside, reading
from oxillama_torch.server.http import json_body
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.admin import LoadAdapterBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of adapter administration; ``model`` says whose, where it is not the first's."""
    routes = Blueprint("loras", __name__)
    if services.default.config.adapter_root is not None:
        prepare_reading()

    @routes.get("/admin/loras")
    def list_loras() -> Response:
        asked = request.args.get("model")
        of = services.ready() if asked is None else [_model(services, asked)]
        data = [_describe(service, f) for service in of for f in service.engine.adapters.facts()]
        return jsonify({"object": "list", "data": data})

    @routes.post("/admin/loras")
    def load() -> tuple[Response, int]:
        body = LoadAdapterBody.model_validate(json_body())
        service = _model(services, body.model)
        if any(body.name == model["id"] for model in services.describe()):
            raise RequestError("an adapter cannot have a model's name", param="name")
        path = inside(service.config.adapter_root, body.path, "adapter")
        with reading(path, body.path, "adapter"):
            loaded = service.engine.adapters.load(body.name, path, pinned=body.pinned)
        return jsonify(_describe(service, loaded.facts(body.pinned))), 201

    @routes.delete("/admin/loras/<path:name>")
    def drop(name: str) -> Response:
        _model(services, request.args.get("model")).engine.adapters.drop(name)
        return jsonify({"id": name, "object": "lora", "deleted": True})

    return routes


def _model(services: Services, name: str | None) -> Service:
    """The model that is meant; an adapter's name means its model."""
    return services.default if name is None else services.find(name)[0]


def _describe(service: Service, facts: AdapterFacts) -> dict:
    return {
        "id": facts.name,
        "name": facts.name,
        "object": "lora",
        "parent": service.model_id,
        "digest": facts.digest,
        "ranks": list(facts.ranks),
        "bytes": facts.nbytes,
        "pinned": facts.pinned,
        "resident": facts.resident,
    }
