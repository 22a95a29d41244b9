"""Routes that tell how the server is: health, readiness, metrics, properties, slots."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify
from prometheus_client import CONTENT_TYPE_LATEST

from oxillama_torch import __version__
from oxillama_torch.engine.engine import DEFAULT_BATCH_SIZE
from oxillama_torch.server.metrics import Metrics
from oxillama_torch.server.native.completion import settings
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.native_completion import NativeCompletionBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of the server's state."""
    routes = Blueprint("native_state", __name__)
    service = services.default

    @routes.get("/health")
    @routes.get("/v1/health")
    def health() -> tuple[Response, int]:
        if not all(service.engine.alive for service in services.ready()):
            return jsonify({"status": "error", "version": __version__}), 503
        return jsonify({"status": "ok", "version": __version__}), 200

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        if current_app.extensions["lifecycle"].draining:
            return jsonify({"status": "draining"}), 503
        if not services.default.engine.alive:
            return jsonify({"status": "error"}), 503
        return jsonify({"status": "ready"}), 200

    @routes.get("/metrics")
    def metrics() -> Response:
        found: Metrics = current_app.extensions["metrics"]
        response = Response(found.exposition(), content_type=CONTENT_TYPE_LATEST)
        response.headers["Process-Start-Time-Unix"] = str(int(found.started_at))
        return response

    @routes.get("/stats")
    def stats() -> Response:
        return jsonify(service.engine.stats())

    @routes.get("/props")
    def props() -> Response:
        return jsonify(_props(service))

    @routes.get("/slots")
    def slots() -> Response:
        return jsonify(_slots(service))

    return routes


def _batch_size(service: Service) -> int:
    config = service.owner.config if service.owner is not None else None
    return (config and config.max_batch_size) or DEFAULT_BATCH_SIZE


def _props(service: Service) -> dict:
    tokenizer, template = service.tokenizer, service.template
    path = service.owner.config.model_path.name if service.owner is not None else ""
    params = NativeCompletionBody(prompt="").sampling_params(service)

    def text(token_id: int | None) -> str:
        return "" if token_id is None else tokenizer.token_bytes(token_id).decode(errors="replace")

    return {
        "default_generation_settings": {
            "n_ctx": service.engine.max_context,
            "params": settings(params, service),
        },
        "total_slots": _batch_size(service),
        "model_alias": service.model_id,
        "model_path": path,
        "modalities": {"vision": False, "audio": False},
        "chat_template": template.source if template is not None else "",
        "bos_token": text(tokenizer.bos_id),
        "eos_token": text(tokenizer.eos_id),
        "build_info": f"oxillama-torch {__version__}",
        "is_sleeping": False,
    }


def _slots(service: Service) -> list[dict]:
    """Places in the batch: which of them are taken, not by whom or with what."""
    running = int(service.engine.stats()["running"])
    return [
        {
            "id": index,
            "n_ctx": service.engine.max_context,
            "speculative": False,
            "is_processing": index < running,
        }
        for index in range(_batch_size(service))
    ]
