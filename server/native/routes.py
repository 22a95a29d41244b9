"""All routes of llama-server's dialect."""

from __future__ import annotations

from flask import Blueprint

from oxillama_torch.server.native import completion, lora_adapters, server_state, text
from oxillama_torch.server.native.lora_adapters import AdapterScales
from oxillama_torch.server.pool import Services

__all__ = ["blueprints"]


def blueprints(services: Services) -> list[Blueprint]:
    """Unprefixed routes; their errors have llama-server's form (``errors.llama_envelope``)."""
    scales = AdapterScales()
    return [
        server_state.blueprint(services),
        text.blueprint(services),
        completion.blueprint(services, scales),
        lora_adapters.blueprint(services, scales),
    ]
