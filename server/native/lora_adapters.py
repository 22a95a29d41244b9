"""``/lora-adapters``: the scales that native completions use adapters with."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flask import Blueprint, Response, jsonify
from pydantic import TypeAdapter

from oxillama_torch.errors import RequestError
from oxillama_torch.server.http import json_array
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.common import with_integers
from oxillama_torch.server.schemas.native_completion import ScaledAdapter
from oxillama_torch.server.service import Service

__all__ = ["AdapterScales", "blueprint"]

_Scales = TypeAdapter(list[ScaledAdapter])


class AdapterScales:
    """Scales that hold where a request says nothing: 0 until they are set. Thread-safe.

    Adapters are numbered as they are listed, in alphabetical order; of the first model.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scales: dict[str, float] = {}

    def listed(self, service: Service) -> list[tuple[str, float]]:
        """Every adapter with its scale."""
        with self._lock:
            names = service.engine.adapters.names()
            return [(name, self._scales.get(name, 0.0)) for name in names]

    def set(self, service: Service, scales: Sequence[ScaledAdapter]) -> None:
        """Set the scales; adapters that are not named get 0."""
        named = dict(self._named(service, scales))
        with self._lock:
            self._scales = named

    def adapters(
        self, service: Service, scales: Sequence[ScaledAdapter] | None
    ) -> tuple[tuple[str, float], ...]:
        """(name, scale) pairs of a request; ``scales`` are its own, or None."""
        pairs = self.listed(service) if scales is None else self._named(service, scales)
        return tuple((name, scale) for name, scale in pairs if scale)

    def _named(self, service: Service, scales: Sequence[ScaledAdapter]) -> list[tuple[str, float]]:
        names = service.engine.adapters.names()
        for item in scales:
            if item.id >= len(names):
                raise RequestError(
                    f"there is no adapter {item.id}",
                    status=404,
                    code="adapter_not_found",
                    param="lora",
                )
        return [(names[item.id], item.scale) for item in scales]


def blueprint(services: Services, scales: AdapterScales) -> Blueprint:
    """Routes of adapter scales."""
    routes = Blueprint("native_lora_adapters", __name__)

    @routes.get("/lora-adapters")
    def show() -> Response:
        return jsonify(
            [
                {"id": index, "path": name, "scale": scale}
                for index, (name, scale) in enumerate(scales.listed(services.default))
            ]
        )

    @routes.post("/lora-adapters")
    def change() -> Response:
        scales.set(services.default, _Scales.validate_python(with_integers(json_array())))
        return jsonify({"success": True})

    return routes
