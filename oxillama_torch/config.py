"""Configuration: frozen dataclasses, built once at the edge; the only reader of the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from oxillama_torch.errors import UnsupportedError

__all__ = ["EngineConfig", "Numerics", "ServerConfig", "demo_model_path", "environment"]

Numerics = Literal["auto", "invariant", "fast"]

_COUNTS = (
    *("max_batch_size", "max_batch_tokens", "max_context", "page_size", "kv_pages"),
    *("graph_batch_size", "draft_tokens", "swap_memory_bytes"),
)


def demo_model_path() -> Path:
    """The GGUF file that ships in the package."""
    return Path(__file__).parent / "data" / "demo.gguf"


def environment(name: str, default: str | None = None) -> str | None:
    """Value of ``OXILLAMA_<name>``; empty counts as unset."""
    return os.environ.get(f"OXILLAMA_{name}") or default


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the engine needs to know.

    Args:
        model: GGUF file (first shard of a split set); None: the demo model.
        device: ``auto`` (cuda when there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        numerics: ``invariant``, ``fast`` or ``auto``.
        dtype: activation dtype: ``auto`` (float32 on CPU, bfloat16 on CUDA), ``float32``,
            ``bfloat16`` or ``float16``.
        kv_dtype: keys and values in their pages: ``auto`` (the activations' dtype), ``f32``,
            ``f16``, ``bf16``, ``fp8``, ``q8_0`` or ``q4_0``.
        kernels: rules such as ``"attention=reference"``; None: ``OXILLAMA_KERNELS``.
        kernel_path: Python file that registers kernels of the user's own, or None.
        tuned: table of tile sizes that ``oxillama kernels tune`` has written; None: what ships.
        max_batch_size: most requests running at once; None: 64.
        max_batch_tokens: token budget of one step (prefill chunks plus decode rows).
        max_context: tokens per request; None: the model's, bounded by the memory for pages.
        page_size: tokens per KV page.
        kv_pages: number of KV pages; None: from ``kv_memory_bytes``.
        kv_memory_bytes: memory for KV pages; None: chosen from what is free.
        preemption: what becomes of the pages of a request that makes room for another: it computes
            them again (``recompute``), or they wait in host memory (``swap``).
        swap_memory_bytes: host memory for them; where it is full, requests compute again. None: as
            much as the KV pages take, at most 4 GiB.
        prefix_cache: keep and reuse KV pages of finished requests.
        inbox_size: requests that may wait to be admitted; beyond it CapacityError.
        adapter_memory_bytes: for adapters on the device; beyond it those used longest ago are read
            again when a request names them. None: no limit.
        speculation: what guesses the next tokens: ``none``, ``lookup`` (the request's own text) or
            ``draft`` (a small model); see ``docs/speculation.md``.
        draft_model: GGUF file that guesses, for ``draft``; None: the demo model's own draft, for
            the demo model.
        draft_tokens: most guesses per request and step; None: 8 for ``lookup``, 4 for ``draft``.
        threads: torch threads on CPU; None: torch's own choice.
        graphs: whether decode steps are recorded and replayed as CUDA graphs: ``on``, ``off`` or
            ``auto`` (on a GPU).
        graph_batch_size: most requests of a step that is replayed; None: ``max_batch_size``.
        graph_prompt_tokens: longest prompt, or chunk of one, that is replayed where it has a step
            to itself; 0: none is.
        type_39_is_q1_0: the file is OxiLLaMa's, whose Q1_0 tensors have the number of MXFP4.
    """

    model: Path | None = None
    device: str = "auto"
    numerics: Numerics = "auto"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    kernels: str | None = None
    kernel_path: Path | None = None
    tuned: Path | None = None
    max_batch_size: int | None = None
    max_batch_tokens: int = 512
    max_context: int | None = None
    page_size: int = 32
    kv_pages: int | None = None
    kv_memory_bytes: int | None = None
    preemption: str = "recompute"
    swap_memory_bytes: int | None = None
    prefix_cache: bool = True
    inbox_size: int = 256
    adapter_memory_bytes: int | None = None
    speculation: str = "none"
    draft_model: Path | None = None
    draft_tokens: int | None = None
    threads: int | None = None
    graphs: Literal["auto", "on", "off"] = "auto"
    graph_batch_size: int | None = None
    graph_prompt_tokens: int = 128
    type_39_is_q1_0: bool = False

    def __post_init__(self) -> None:
        _choice("numerics", self.numerics, ("auto", "invariant", "fast"))
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _choice("kv_dtype", self.kv_dtype, ("auto", "f32", "f16", "bf16", "fp8", "q8_0", "q4_0"))
        _choice("preemption", self.preemption, ("recompute", "swap"))
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise UnsupportedError(f"device {self.device!r}", ("auto", "cpu", "cuda", "cuda:N"))
        _choice("graphs", self.graphs, ("auto", "on", "off"))
        _choice("speculation", self.speculation, ("none", "lookup", "draft"))
        if self.draft_model is not None and self.speculation != "draft":
            raise UnsupportedError(
                f"a draft model with speculation {self.speculation!r}", ("draft",)
            )
        is_demo = self.model is None or Path(self.model) == demo_model_path()
        if self.speculation == "draft" and self.draft_model is None and not is_demo:
            raise UnsupportedError("speculation 'draft' without a draft model for this model")
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnsupportedError(f"{name} must be at least 1, got {value}")
        if self.graph_prompt_tokens < 0:
            raise UnsupportedError(f"graph_prompt_tokens {self.graph_prompt_tokens}: 0 or more")
        if self.page_size & (self.page_size - 1) or self.page_size < 16:
            raise UnsupportedError(f"page_size {self.page_size}: a power of two of at least 16")

    @property
    def model_path(self) -> Path:
        return self.model if self.model is not None else demo_model_path()

    @property
    def draft_path(self) -> Path | None:
        """The file that guesses; None unless ``speculation`` is ``draft``."""
        if self.speculation != "draft":
            return None
        return self.draft_model or demo_model_path().with_name("demo_draft.gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What the HTTP server needs to know.

    Args:
        host, port: where to listen.
        max_streams: requests with a thread of their own at once; beyond it 503.
        max_body_bytes: larger request bodies get 413.
        api_keys: accepted bearer keys; empty: no authentication.
        model_alias: the name in ``/v1/models``; None: from the file.
        ping_interval_s: seconds of silence after which a stream sends ``: ping``.
        template_timeout_s: limit for rendering a chat template.
        request_timeout_s: deadline of a request; None: none.
        header_timeout_s, body_timeout_s: a request's head, then its body, must have come by then.
        send_timeout_s: a client that reads nothing for so long loses its connection.
        loras: adapters loaded at start, ``name=path`` each.
        adapter_root: folder that adapters may be loaded from over HTTP; None: not over HTTP.
        admin_token: bearer token of ``/admin/*``; None: clients on this machine need none, others
            are refused.
        store: SQLite file or database URL for what outlives a request; None: a private one that
            goes with the process.
        blobs: folder of files' contents; None: beside the SQLite file.
        max_file_bytes: larger uploads get 413; the only bodies that ``max_body_bytes`` is not for.
        batch_lines: lines of batches that run at once; others are served first.
        models: further models loaded at start, ``name=path`` each.
        model_root: folder that models may be loaded from over HTTP; None: not over HTTP.
        max_models: most models loaded at once; the one used longest ago makes room.
        model_memory_bytes: for all models together; None: no limit.
        api_key_file: keys, one per line, read again when the file changes; see ``server/keys.py``.
        jwt_key: file with the key of JSON web tokens: a secret (HS256) or a public key (RS256).
        jwt_audience, jwt_issuer: what such a token must name; None: neither is looked at.
        requests_per_minute, tokens_per_minute: of each key; None: no limit.
        cors_origins: origins whose pages may use the API (``*``: all); empty: none.
        access_log: file that gets a JSON line per request, ``-`` for stderr; None: no log.
        processors: logits processors that requests may name, ``name=module:function`` each.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    max_streams: int = 256
    max_body_bytes: int = 4 * 1024 * 1024
    api_keys: tuple[str, ...] = ()
    model_alias: str | None = None
    ping_interval_s: float = 5.0
    template_timeout_s: float = 2.0
    request_timeout_s: float | None = None
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 20.0
    loras: tuple[str, ...] = ()
    adapter_root: Path | None = None
    admin_token: str | None = None
    store: str | None = None
    blobs: Path | None = None
    max_file_bytes: int = 512 * 1024 * 1024
    batch_lines: int = 16
    models: tuple[str, ...] = ()
    model_root: Path | None = None
    max_models: int = 4
    model_memory_bytes: int | None = None
    api_key_file: Path | None = None
    jwt_key: Path | None = None
    jwt_audience: str | None = None
    jwt_issuer: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    cors_origins: tuple[str, ...] = ()
    access_log: str | None = None
    processors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UnsupportedError(f"port must be between 0 and 65535, got {self.port}")
        counts = ("max_streams", "max_body_bytes", "max_models", "max_file_bytes", "batch_lines")
        for name in counts:
            if getattr(self, name) < 1:
                raise UnsupportedError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("model_memory_bytes", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnsupportedError(f"{name} must be at least 1, got {value}")
        for kind, specs in (("adapter", self.loras), ("model", self.models)):
            for spec in specs:
                name, _, path = spec.partition("=")
                if not name or not path:
                    raise UnsupportedError(f"{kind} {spec!r}", ("name=path",))


def from_environment(config: EngineConfig | ServerConfig) -> EngineConfig | ServerConfig:
    """Fill in fields from ``OXILLAMA_<FIELD>`` variables, as gunicorn deployments set them.

    Raises:
        UnsupportedError: a value that does not parse.
    """
    changes = {}
    for item in fields(config):
        text = environment(item.name.upper())
        if text is not None:
            changes[item.name] = _parse(item.name, str(item.type), text)
    return replace(config, **changes)


def _parse(name: str, kind: str, text: str) -> object:
    try:
        if kind.startswith("int"):
            return int(text)
        if kind.startswith("float"):
            return float(text)
    except ValueError:
        raise UnsupportedError(f"OXILLAMA_{name.upper()}={text!r} is not a number") from None
    if kind.startswith("bool"):
        _choice(f"OXILLAMA_{name.upper()}", text.lower(), ("0", "1", "false", "true"))
        return text.lower() in ("1", "true")
    if kind.startswith("tuple"):
        return tuple(filter(None, (part.strip() for part in text.split(","))))
    return Path(text) if kind.startswith("Path") else text


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnsupportedError(f"{name} {value!r}", known)
