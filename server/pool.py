"""The models being served: found by name, loaded in the background, the least used one put away.

A model that was put away to make room is known still: a request that names it has it loaded again
and is told to come back. A model leaves only when nothing uses it; what its engine was given before
that is finished first.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from flask import g, has_request_context

from oxillama_torch.config import EngineConfig, ServerConfig
from oxillama_torch.errors import CapacityError, OxiLlamaError, RequestError
from oxillama_torch.llm import LLM
from oxillama_torch.server.model_entry import ModelEntry, ModelLoading, engine_config, planned_bytes
from oxillama_torch.server.service import Service

__all__ = ["Services"]

log = logging.getLogger(__name__)

_LEASE_CHECK_S = 0.02
# Clients that ask again at once for what is being loaded would take the interpreter from the thread
# that loads it.
_REFUSAL_PAUSE_S = 0.05

Adapters = tuple[tuple[str, float], ...]
OpenModel = Callable[[EngineConfig, Callable[[int, int], None]], LLM]


class _Closing(Exception):  # noqa: N818 (ends a load, no error of anybody's)
    """The server stops while a model is being loaded."""


class Services:
    """Every model of this server. Thread-safe.

    Args:
        default: the model given at start. It is its owner's and never put away.
        config: ``max_models`` and ``model_memory_bytes`` bound what is loaded at once.
        open_model: loads a model; called in a thread of its own.
        base: settings that loaded models share with the first.

    Attributes:
        default: serves routes that name no model.
    """

    def __init__(
        self,
        default: Service,
        config: ServerConfig,
        open_model: OpenModel = LLM.from_config,
        base: EngineConfig | None = None,
    ) -> None:
        self.default, self.config = default, config
        if base is None:
            base = default.owner.config if default.owner is not None else EngineConfig()
        self._base, self._open_model = base, open_model
        self._lock = threading.RLock()
        self._loading = threading.Lock()  # one at a time: each plans with the memory that is free
        self._threads: list[threading.Thread] = []
        self._closing = False
        first = ModelEntry(default.model_id, None, status="ready", service=default)
        if default.owner is not None:
            first.path = default.owner.config.model_path
            pages = int(default.engine.stats()["pages"])
            first.needed_bytes = planned_bytes(replace(default.owner.config, kv_pages=pages))
        self._entries = {first.name: first}

    # Looking up

    def find(self, name: str) -> tuple[Service, Adapters]:
        """The model that a request names, and the adapters the name stands for.

        Within an HTTP request the model stays until the request's thread is done with it; from
        then on what it has submitted keeps it.

        Raises:
            RequestError: nothing is called so (404), or it is being loaded (503).
        """
        try:
            with self._lock:
                entry, adapters = self._look_up(name)
                entry.last_used = time.monotonic()
                if has_request_context():
                    entry.leases += 1
                    g.setdefault("model_leases", []).append(entry)
                return entry.service, adapters
        except ModelLoading:
            time.sleep(_REFUSAL_PAUSE_S)
            raise

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[tuple[Service, Adapters]]:
        """As ``find``, for a block: what runs outside of a request, or longer than one."""
        with self._lock:
            entry, adapters = self._look_up(name)
            entry.leases += 1
        try:
            yield entry.service, adapters
        finally:
            self._release(entry)

    def end_of_request(self, _error: BaseException | None = None) -> None:
        """Give back what ``find`` has lent to the request that ends."""
        for entry in g.pop("model_leases", ()):
            self._release(entry)

    def ready(self) -> list[Service]:
        """Models that can answer now, the first one first."""
        with self._lock:
            return [e.service for e in self._entries.values() if e.service is not None]

    def describe(self) -> list[dict]:
        """Every known model, for ``GET /admin/models``."""
        with self._lock:
            return [entry.as_dict() for entry in self._entries.values()]

    def _look_up(self, name: str) -> tuple[ModelEntry, Adapters]:
        if (entry := self._entries.get(name)) is not None:
            self._wake(entry)
            return entry, ()
        for entry in self._entries.values():
            if entry.service is not None and name in entry.service.engine.adapters.names():
                return entry, ((name, 1.0),)
        known = ", ".join(repr(known) for known in self._entries)
        raise _not_found(f"The model {name!r} does not exist; this server has {known}.")

    def _wake(self, entry: ModelEntry) -> None:
        """Make sure that a model answers, or say why it does not."""
        if entry.status == "failed":
            raise _not_found(f"The model {entry.name!r} could not be loaded: {entry.error}.")
        if entry.status == "unloaded":
            self._start(entry)
        if entry.status == "loading":
            raise ModelLoading(entry)

    def _release(self, entry: ModelEntry) -> None:
        with self._lock:
            entry.leases -= 1
            entry.last_used = time.monotonic()

    # Loading

    def load(self, name: str, path: Path) -> dict:
        """Begin to load a model; returns its description at once.

        Raises:
            RequestError: the name is taken.
            GGUFError, UnsupportedError, OSError: the file cannot be served.
            CapacityError: there is no room, and everything loaded is in use.
        """
        needed = planned_bytes(engine_config(self._base, path))
        with self._lock:
            known = self._entries.get(name)
            if known is not None and known.status in ("loading", "ready"):
                raise RequestError(f"{name!r} is {known.status} already", param="id")
            if any(name in service.engine.adapters.names() for service in self.ready()):
                raise RequestError(f"{name!r} is the name of an adapter", param="id")
            entry = ModelEntry(name, path, needed_bytes=needed)
            self._start(entry)
            self._entries[name] = entry
            return entry.as_dict()

    def unload(self, name: str) -> dict:
        """Forget a model. What it works on is finished; its memory is free after that.

        Raises:
            RequestError: there is no such model, it is being loaded, or it is the first.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise _not_found(f"The model {name!r} does not exist.")
            if entry.service is self.default:
                raise RequestError("the model given at start cannot be unloaded", param="id")
            if entry.status == "loading":
                raise RequestError("the model is still being loaded", param="id")
            del self._entries[name]
            service, entry.service = entry.service, None
            entry.status = "unloaded"
            if service is not None:
                self._in_thread(f"unload {name}", lambda: self._shut_when_left(entry, service))
            return entry.as_dict()

    def _shut_when_left(self, entry: ModelEntry, service: Service) -> None:
        """Requests that found the model before it went have still to hand in what they want."""
        while entry.leases and not self._closing:
            time.sleep(_LEASE_CHECK_S)
        _shut(service)

    def _start(self, entry: ModelEntry) -> None:
        evicted = self._make_room(entry)
        entry.begin_loading()
        self._in_thread(f"load {entry.name}", lambda: self._load(entry, evicted))

    def _in_thread(self, name: str, function: Callable[[], None]) -> None:
        if self._closing:
            raise CapacityError("the server is shutting down")
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=function, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _make_room(self, new: ModelEntry) -> list[Service]:
        """Put idle models away, those used longest ago first; their engines are still to be shut.

        Nothing is put away when that would not be enough.
        """
        held = [e for e in self._entries.values() if e.status in ("loading", "ready")]
        idle = [e for e in held if e.service is not self.default and e.idle]
        idle.sort(key=lambda entry: entry.last_used)
        victims: list[ModelEntry] = []
        while not self._fits([e for e in held if e not in victims], new):
            if not idle:
                raise CapacityError(
                    f"no room for {new.name!r} ({new.needed_bytes} bytes): "
                    "what is loaded is in use or was given at start"
                )
            victims.append(idle.pop(0))
        return [victim.put_away() for victim in victims]

    def _fits(self, held: list[ModelEntry], new: ModelEntry) -> bool:
        budget = self.config.model_memory_bytes
        total = new.needed_bytes + sum(entry.needed_bytes for entry in held)
        return len(held) < self.config.max_models and (budget is None or total <= budget)

    def _load(self, entry: ModelEntry, evicted: list[Service]) -> None:
        def progress(done: int, total: int) -> None:
            if self._closing:
                raise _Closing
            entry.loaded_bytes, entry.total_bytes = done, total

        for service in evicted:
            log.info("model %s is put away", service.model_id)
            _shut(service)
        del evicted
        try:
            with self._loading:
                llm = self._open_model(engine_config(self._base, entry.path), progress)
        except _Closing:
            entry.fail("the server is shutting down")
        except (OxiLlamaError, OSError, torch.OutOfMemoryError) as error:
            log.warning("model %s could not be loaded: %s", entry.name, error)
            entry.fail(error.strerror if isinstance(error, OSError) else str(error))
        except Exception:
            log.exception("model %s could not be loaded", entry.name)
            entry.fail("internal error")
        else:
            config = replace(self.config, model_alias=entry.name)
            with self._lock:
                entry.become_ready(Service.from_llm(llm, config))

    def close(self) -> None:
        """Stop every model but the first, which is its owner's."""
        self._closing = True
        for thread in self._threads:
            thread.join()
        with self._lock:
            for service in self.ready():
                if service is not self.default:
                    service.close()


def _shut(service: Service) -> None:
    """Let a model finish what it has, then free its memory."""
    service.engine.stop(drain=True)
    service.close()
    service.owner = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _not_found(message: str) -> RequestError:
    return RequestError(message, status=404, code="model_not_found", param="model")
