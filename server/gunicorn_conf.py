"""gunicorn settings for one engine: ``gunicorn -c python:oxillama_torch.server.gunicorn_conf ...``.

One worker process, because each would load its own copy of the model; one thread per request in
progress. CUDA is touched only after the fork.
"""

from __future__ import annotations

from oxillama_torch.config import ServerConfig, from_environment
from oxillama_torch.server.lifecycle import SPARE_THREADS

_config = from_environment(ServerConfig())

bind = f"{_config.host}:{_config.port}"
workers = 1
worker_class = "oxillama_torch.server.worker.Worker"
# Spare threads keep /health answering while every stream is taken.
threads = _config.max_streams + SPARE_THREADS
worker_connections = 4 * threads
# Loading a model may take minutes, and a hung GPU does not stop the thread that this would watch.
timeout = 0
graceful_timeout = 10
keepalive = 30
preload_app = False
# It would let anything running as this user stop the server, unannounced.
control_socket_disable = True
# What is in progress when the server must end at once has so long to say so.
_LAST_WORDS_S = 1.0


def on_starting(server) -> None:
    """Refuse settings that would lose requests or load the model several times."""
    cfg = server.cfg
    problems = {
        "workers must be 1: every worker would load the model": cfg.workers != 1,
        "preload_app must be off: CUDA does not survive a fork": cfg.preload_app,
        "max_requests must be 0: a restart cuts every stream": cfg.max_requests > 0,
    }
    for message, wrong in problems.items():
        if wrong:
            raise SystemExit(f"error: {message}")


def worker_exit(server, worker) -> None:
    """Stop the batching thread and the template worker with the process."""
    from oxillama_torch.server.app import close_app  # imports torch: not in the master

    app = getattr(worker, "wsgi", None)
    if app is not None and hasattr(app, "extensions"):
        lifecycle = app.extensions["lifecycle"]
        # On SIGINT: a stream must not end without a word.
        lifecycle.drain()
        lifecycle.abort()
        lifecycle.wait_idle(_LAST_WORDS_S)
        close_app(app)
        app.extensions["service"].close()
