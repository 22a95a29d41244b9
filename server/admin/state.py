"""``/admin/stats``, ``/admin/health`` and ``/admin/drain``: how the server is."""

from __future__ import annotations

import time

from flask import Blueprint, Response, current_app, jsonify

from oxillama_torch import __version__
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.pool import Services

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes that tell the state of the server, and drain it."""
    routes = Blueprint("admin_state", __name__)
    started = time.monotonic()

    @routes.get("/admin/stats")
    def stats() -> Response:
        lifecycle = _lifecycle()
        return jsonify(
            {
                "version": __version__,
                "uptime_s": round(time.monotonic() - started, 3),
                "requests_total": lifecycle.started,
                "active_requests": lifecycle.in_progress,
                "draining": lifecycle.draining,
                "models": {s.model_id: s.engine.stats() for s in services.ready()},
            }
        )

    @routes.get("/admin/health")
    def health() -> tuple[Response, int]:
        models = {service.model_id: service.engine.alive for service in services.ready()}
        healthy = all(models.values())
        status = {"status": "ok" if healthy else "error", "version": __version__, "alive": models}
        return jsonify(status), 200 if healthy else 503

    @routes.get("/admin/drain")
    def drained() -> Response:
        return jsonify(_drain_state())

    @routes.post("/admin/drain")
    def drain() -> tuple[Response, int]:
        _lifecycle().drain()
        return jsonify(_drain_state()), 202

    @routes.delete("/admin/drain")
    def resume() -> Response:
        _lifecycle().resume()
        return jsonify(_drain_state())

    return routes


def _lifecycle() -> Lifecycle:
    return current_app.extensions["lifecycle"]


def _drain_state() -> dict:
    lifecycle = _lifecycle()
    return {"draining": lifecycle.draining, "in_progress": lifecycle.in_progress}
