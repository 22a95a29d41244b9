"""What the routes serve: one engine with its tokenizer, chat template and name."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from oxillama_torch.config import ServerConfig
from oxillama_torch.engine.outbox import Outbox
from oxillama_torch.engine.request import GenerationRequest, RequestHandle
from oxillama_torch.errors import RequestError
from oxillama_torch.llm import LLM
from oxillama_torch.lora.registry import AdapterRegistry
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.tokenizer.chat_template import ChatTemplate
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["EnginePort", "Service"]


class EnginePort(Protocol):
    """The engine as the server sees it (``engine.thread.EngineThread``, or a fake in tests)."""

    alive: bool
    adapters: AdapterRegistry
    max_context: int

    def submit(self, request: GenerationRequest, outbox: Outbox | None = None) -> RequestHandle: ...
    def stats(self) -> dict: ...
    def stop(self) -> None: ...


@dataclass(slots=True)
class Service:
    """A model being served.

    Args:
        model_id: its name in ``/v1/models`` and in answers.
        fingerprint: build, model, numerics, kernels and device; equal outputs are promised for
            equal fingerprints only.
        template: None when the file has no chat template.
    """

    model_id: str
    engine: EnginePort
    tokenizer: Tokenizer
    template: ChatTemplate | None
    config: ServerConfig
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    # An LLM that nobody holds any more stops its engine.
    owner: LLM | None = None

    @classmethod
    def from_llm(cls, llm: LLM, config: ServerConfig) -> Service:
        """Serve what ``llm`` has loaded, through the same batching thread."""
        if llm.chat_template is not None:
            llm.chat_template.max_tokens = llm.engine.max_context
        return cls(
            model_id=config.model_alias or llm.name,
            engine=llm.engine,
            tokenizer=llm.tokenizer,
            template=llm.chat_template,
            config=config,
            fingerprint=llm.fingerprint,
            owner=llm,
        )

    def encode(self, text: str, param: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a prompt; one that is far too long is refused before it is encoded.

        Raises:
            RequestError: names ``param``.
        """
        self.tokenizer.check_fits(text, self.engine.max_context, param)
        return self.tokenizer.encode(text, add_special=add_special)

    def check_processors(self, params: SamplingParams) -> None:
        """Refuse logits processors that the server was not started with.

        Raises:
            RequestError: names the first.
        """
        allowed = [spec.partition("=")[0] for spec in self.config.processors]
        for name in params.processors:
            if name not in allowed:
                known = ", ".join(allowed) or "none"
                raise RequestError(
                    f"unknown processor {name!r}; this server has: {known}", param="processors"
                )

    def close(self) -> None:
        """Stop the engine thread and the template worker."""
        self.engine.stop()
        if self.template is not None:
            self.template.close()
