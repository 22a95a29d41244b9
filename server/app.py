"""The Flask application."""

from __future__ import annotations

from pathlib import Path

from flask import Flask

from oxillama_torch.config import EngineConfig, ServerConfig, from_environment
from oxillama_torch.llm import LLM
from oxillama_torch.sampling.custom import load_processor
from oxillama_torch.server import errors, http
from oxillama_torch.server.access import Access
from oxillama_torch.server.access_log import AccessLog
from oxillama_torch.server.admin import kernels, loras, state
from oxillama_torch.server.admin import models as admin_models
from oxillama_torch.server.assistants.records import recover_runs
from oxillama_torch.server.batches.runner import BatchRunner
from oxillama_torch.server.lifecycle import Lifecycle
from oxillama_torch.server.metrics import Metrics
from oxillama_torch.server.native import routes as native
from oxillama_torch.server.openai import (
    assistants,
    batches,
    chat,
    chat_ws,
    completions,
    conversations,
    embeddings,
    files,
    models,
    responses,
    responses_ws,
    runs,
    stored_completions,
    threads,
)
from oxillama_torch.server.openapi import routes as openapi
from oxillama_torch.server.output_thread import OutputThread
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.recovery import Recovery
from oxillama_torch.server.responses.runner import ResponseRunner
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
    for spec in service.config.processors:
        load_processor(spec)
    app = Flask(__name__, static_folder=None)
    # First of all: unsound settings end the start here, before there is anything to clean up.
    app.extensions["access"] = Access(service.config)
    log = service.config.access_log
    app.extensions["access_log"] = AccessLog(log) if log is not None else None
    app.json.sort_keys = False
    # A redirect to another spelling of a path would be followed with other rules of access.
    app.url_map.merge_slashes = False
    app.extensions["service"] = service
    services = Services(service, service.config)
    app.extensions["services"] = services
    store = app.extensions["store"] = Store(service.config)
    app.extensions["disconnect_watcher"] = DisconnectWatcher()
    app.extensions["lifecycle"] = Lifecycle(service.config.max_streams)
    app.extensions["output_thread"] = OutputThread(
        service.config.ping_interval_s, service.config.send_timeout_s
    )
    metrics = app.extensions["metrics"] = Metrics(services, app.extensions["lifecycle"])
    http.install(app, service.config, metrics)
    app.teardown_request(services.end_of_request)
    errors.install(app)
    for module in (batches, chat, completions, conversations, embeddings, files, models):
        app.register_blueprint(module.blueprint(services))
    app.register_blueprint(chat_ws.blueprint(services))
    app.register_blueprint(openapi.blueprint(services))
    for routes in native.blueprints(services):
        app.register_blueprint(routes)
    for module in (assistants, threads, runs):
        app.register_blueprint(module.blueprint(services))
    for module in (responses, responses_ws, stored_completions):
        app.register_blueprint(module.blueprint(services))
    for module in (admin_models, loras, kernels, state):
        app.register_blueprint(module.blueprint(services))
    for spec in service.config.models:
        name, _, path = spec.partition("=")
        services.load(name, Path(path))
    runner = app.extensions["batches"] = BatchRunner(app, store, service.config)
    store.on_start(lambda: sweep_blobs(store))
    store.on_start(runner.resume)
    app.extensions["runs"] = ResponseRunner()
    store.on_start(lambda: recover_runs(store))
    app.extensions["responses"] = ResponseRunner()
    recovery = Recovery(services, store, app.extensions["responses"])
    app.extensions["recovery"] = recovery
    store.on_start(recovery.start)
    store.start()
    return app


def close_app(app: Flask) -> None:
    """Stop the application's own threads and models; the engine given at start is its owner's."""
    app.extensions["batches"].close()
    app.extensions["recovery"].close()
    app.extensions["responses"].close()
    app.extensions["runs"].close()
    app.extensions["services"].close()
    app.extensions["disconnect_watcher"].close()
    app.extensions["output_thread"].close()
    app.extensions["store"].close()
    if app.extensions["access_log"] is not None:
        app.extensions["access_log"].close()
