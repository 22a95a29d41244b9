"""One model of the pool: where it stands, and how much memory it takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import DEFAULT_BATCH_SIZE
from oxillama_torch.engine.loading import open_model, resolve
from oxillama_torch.errors import RequestError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile, read_gguf
from oxillama_torch.kernels import registry
from oxillama_torch.models.config import ModelConfig
from oxillama_torch.models.memory import MemoryPlan, memory_plan
from oxillama_torch.server.service import Service

__all__ = ["ModelEntry", "ModelLoading", "engine_config", "planned_bytes"]

Status = Literal["loading", "ready", "failed", "unloaded"]

# Full contexts that the pages of a loaded model hold where nothing else is said: "what is free"
# would leave nothing for the next model.
_KV_CONTEXTS = 8
_MAX_RETRY_AFTER_S = 60


@dataclass(slots=True, eq=False)
class ModelEntry:
    """A model that requests may name.

    Args:
        path: its file; None: it cannot be loaded again.
        needed_bytes: weights, pages and workspace, as planned.
        service: there while it is ready.
        leases: request threads that are about to submit something.
        error: why it failed.
    """

    name: str
    path: Path | None
    status: Status = "loading"
    service: Service | None = None
    needed_bytes: int = 0
    loaded_bytes: int = 0
    total_bytes: int = 0
    leases: int = 0
    error: str | None = None
    last_used: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)

    @property
    def in_flight(self) -> int:
        """Requests that are being served or prepared."""
        if self.service is None:
            return self.leases
        stats = self.service.engine.stats()
        return int(stats["running"]) + int(stats["waiting"]) + self.leases

    @property
    def idle(self) -> bool:
        """Whether it may be put away."""
        return self.status == "ready" and self.path is not None and self.in_flight == 0

    def begin_loading(self) -> None:
        self.status, self.error, self.started = "loading", None, time.monotonic()
        self.loaded_bytes = 0

    def become_ready(self, service: Service) -> None:
        self.status, self.service, self.last_used = "ready", service, time.monotonic()

    def fail(self, reason: str | None) -> None:
        self.status, self.error = "failed", reason or "unknown reason"

    def put_away(self) -> Service:
        """Take the model out of service; returns what is to be shut."""
        assert self.service is not None, "only a ready model is put away"
        service, self.service = self.service, None
        self.status = "unloaded"
        return service

    def retry_after_s(self) -> int:
        """Seconds in which it will be loaded, as far as its progress tells."""
        if not self.loaded_bytes:
            return 2
        elapsed = time.monotonic() - self.started
        rest = elapsed * (self.total_bytes - self.loaded_bytes) / self.loaded_bytes
        return min(max(math.ceil(rest), 1), _MAX_RETRY_AFTER_S)

    def as_dict(self) -> dict:
        """OxiLLaMa's fields, the progress of loading, and why it failed."""
        return {
            "id": self.name,
            "object": "model",
            "status": self.status,
            "mem_bytes": self.needed_bytes if self.status in ("loading", "ready") else 0,
            "last_used_secs_ago": round(time.monotonic() - self.last_used, 3),
            "inflight": self.in_flight,
            "progress": {"loaded_bytes": self.loaded_bytes, "total_bytes": self.total_bytes}
            if self.status == "loading"
            else None,
            "error": self.error,
        }


class ModelLoading(RequestError):
    """The model that was asked for is on its way."""

    def __init__(self, entry: ModelEntry) -> None:
        self.retry_after_s = entry.retry_after_s()
        super().__init__(
            f"The model {entry.name!r} is being loaded.",
            status=503,
            code="model_loading",
            param="model",
            type="server_error",
        )


def engine_config(base: EngineConfig, path: Path) -> EngineConfig:
    """Settings of a further model: the first one's, with pages of a size known beforehand.

    A draft model guesses for the first one alone: another model has another vocabulary. The kernel
    rules in force are kept: loading sets them for the whole process.
    """
    config = replace(
        base,
        model=path,
        kernels=registry.format_rules(registry.active_rules()),
        speculation="none" if base.speculation == "draft" else base.speculation,
        draft_model=None,
    )
    if config.kv_pages is None and config.kv_memory_bytes is None:
        with open_model(config) as gguf:
            model, plan = _plan(gguf, config)
        tokens = _KV_CONTEXTS * min(config.max_context or math.inf, model.context_length)
        config = replace(config, kv_memory_bytes=int(tokens) * plan.kv_bytes_per_token)
    return config


def planned_bytes(config: EngineConfig) -> int:
    """Memory of a model with its pages, before it is loaded.

    Raises:
        GGUFError, UnsupportedError, OSError: the file cannot be served.
    """
    with open_model(config) as gguf:
        model, plan = _plan(gguf, config)
    context = min(config.max_context or math.inf, model.context_length)
    tokens = int(context) * (config.max_batch_size or DEFAULT_BATCH_SIZE)
    if config.kv_pages is not None:
        tokens = config.kv_pages * config.page_size
    elif config.kv_memory_bytes is not None:
        tokens = min(tokens, config.kv_memory_bytes // max(plan.kv_bytes_per_token, 1))
    needed = plan.total_bytes(tokens)
    if config.draft_path is not None:
        with read_gguf(config.draft_path) as gguf:
            needed += _plan(gguf, config)[1].total_bytes(tokens)
    return needed


def _plan(gguf: GGUFFile, config: EngineConfig) -> tuple[ModelConfig, MemoryPlan]:
    model = ModelConfig.from_metadata(Metadata(gguf.metadata, str(gguf.path)))
    device, dtype, numerics = resolve(config)
    plan = memory_plan(
        gguf,
        model,
        dtype=dtype,
        kv_dtype=config.kv_dtype,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_size=config.max_batch_size or DEFAULT_BATCH_SIZE,
        device=device,
        numerics=numerics,
    )
    return model, plan
