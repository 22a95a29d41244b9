"""The Flask application."""

from __future__ import annotations

from pathlib import Path

from flask import Flask

from oxillama_torch.config import EngineConfig, ServerConfig, from_environment
from oxillama_torch.llm import LLM
from oxillama_torch.server import errors, http
from oxillama_torch.server.admin import kernels, loras, state
from oxillama_torch.server.admin import models as admin_models
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.native import routes as native
from oxillama_torch.server.openai import chat, completions, embeddings, files, models
from oxillama_torch.server.output_thread import OutputThread
from oxillama_torch.server.pool import Services
from oxillama_torch.server.service import Service
from oxillama_torch.server.store.files import sweep_blobs
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.watcher import DisconnectWatcher

__all__ = ["close_app", "create_app"]


def create_app(config: ServerConfig | None = None, engine: LLM | Service | None = None) -> Flask:
    """Make the application.

    Args:
        config: server settings; None: from ``OXILLAMA_*`` variables.
        engine: what is served; None: loads the model that ``OXILLAMA_MODEL`` and its like name.
            The caller keeps ownership of an engine it passes in.
    """
    config = config or from_environment(ServerConfig())
    if engine is None:
        engine = LLM.from_config(from_environment(EngineConfig()))
    service = engine if isinstance(engine, Service) else Service.from_llm(engine, config)
    for spec in service.config.loras:
        name, _, path = spec.partition("=")
        service.engine.adapters.load(name, path, pinned=True)
    app = Flask(__name__, static_folder=None)
    app.json.sort_keys = False
    app.extensions["service"] = service
    services = Services(service, service.config)
    app.extensions["services"] = services
    store = app.extensions["store"] = Store(service.config)
    app.extensions["disconnect_watcher"] = DisconnectWatcher()
    app.extensions["lifecycle"] = Lifecycle()
    app.extensions["output_thread"] = OutputThread(
        service.config.ping_interval_s, service.config.send_timeout_s
    )
    http.install(app, service.config)
    app.teardown_request(services.end_of_request)
    errors.install(app)
    for module in (chat, completions, embeddings, files, models, native):
        app.register_blueprint(module.blueprint(services))
    for module in (admin_models, loras, kernels, state):
        app.register_blueprint(module.blueprint(services))
    for spec in service.config.models:
        name, _, path = spec.partition("=")
        services.load(name, Path(path))
    store.on_start(lambda: sweep_blobs(store))
    store.start()
    return app


def close_app(app: Flask) -> None:
    """Stop the application's own threads and models; the engine given at start is its owner's."""
    app.extensions["services"].close()
    app.extensions["disconnect_watcher"].close()
    app.extensions["output_thread"].close()
    app.extensions["store"].close()
