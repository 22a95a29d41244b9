"""``oxillama serve``: gunicorn with our settings, started from Python."""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from oxillama_torch.config import EngineConfig, ServerConfig
from oxillama_torch.errors import OxiLlamaError
from oxillama_torch.llm import LLM
from oxillama_torch.server import gunicorn_conf
from oxillama_torch.server.app import create_app
from oxillama_torch.server.lifecycle import SPARE_THREADS

__all__ = ["Application", "serve"]

_HOOKS = ("on_starting", "worker_exit")
_SETTINGS = (
    "worker_class",
    "workers",
    "timeout",
    "graceful_timeout",
    "keepalive",
    "preload_app",
    "control_socket_disable",
    *_HOOKS,
)
# gunicorn's own code for "do not start another worker".
_BOOT_FAILED = 3


class _Log(Logger):
    """gunicorn's log, without its account of a worker that has said itself why it cannot start."""

    _boot_failed = False

    def error(self, msg, *args, **kwargs) -> None:
        if msg.startswith("Worker (pid:%s) exited") and args[1] == _BOOT_FAILED:
            self._boot_failed = True
        if not self._boot_failed:
            super().error(msg, *args, **kwargs)


class Application(BaseApplication):
    """Loads the model in the worker, after the fork."""

    def __init__(
        self, server: ServerConfig, engine: EngineConfig, open_llm: Callable[[EngineConfig], LLM]
    ) -> None:
        self._server, self._engine, self._open_llm = server, engine, open_llm
        # With port 0 the system chooses one.
        self._port = server.port
        super().__init__()

    def run(self) -> None:
        """As the base class, in the master and in the worker.

        Once everything of ours is closed the process ends at once: to take torch apart object by
        object takes the better part of a second, on a busy machine several.
        """
        try:
            super().run()
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code & 0xFF)

    def load_config(self) -> None:
        for name in _SETTINGS:
            self.cfg.set(name, getattr(gunicorn_conf, name))
        self.cfg.set("bind", _address(self._server.host, self._server.port))
        self.cfg.set("when_ready", self._note_port)
        threads = self._server.max_streams + SPARE_THREADS
        self.cfg.set("threads", threads)
        self.cfg.set("worker_connections", 4 * threads)
        self.cfg.set("loglevel", "warning")
        self.cfg.set("logger_class", _Log)

    def _note_port(self, arbiter) -> None:
        """In the master, once it listens and before it forks."""
        self._port = arbiter.LISTENERS[0].sock.getsockname()[1]

    def load(self) -> Flask:
        try:
            llm = self._open_llm(self._engine)
            app = create_app(self._server, llm)
        except (OxiLlamaError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(_BOOT_FAILED) from None
        url = f"http://{_address(self._server.host, self._port)}"
        _announce(url, llm, app.extensions["service"].model_id)
        return app


def serve(
    server: ServerConfig,
    engine: EngineConfig,
    open_llm: Callable[[EngineConfig], LLM] = LLM.from_config,
) -> None:
    """Serve until interrupted.

    Args:
        open_llm: loads the model, in the worker.

    Raises:
        OSError: the address is taken or not ours.
    """
    _check_address(server.host, server.port)
    Application(server, engine, open_llm).run()


def _check_address(host: str, port: int) -> None:
    """gunicorn would retry for seconds and end without naming the cause."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _announce(url: str, llm: LLM, model_id: str) -> None:
    body = json.dumps(
        {
            "model": model_id,
            "messages": [{"role": "user", "content": "What does `textwrap.dedent` do?"}],
            "temperature": 0,
        }
    )
    path = Path(llm.config.model_path).name
    print(f"serving {model_id} ({path}; {llm.describe()}) on {url}")
    print("try:")
    print(f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print("stop with Ctrl-C", flush=True)
