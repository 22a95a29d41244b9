"""The parent's side of ``template_worker.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from oxillama_torch.workers import WorkerPool

__all__ = ["TemplateLimits", "TemplatePool"]


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may use.

    Args:
        seconds: processor time, compiling included: a busy machine ends no innocent rendering.
        memory: address space of the worker process, bytes.
        output: characters.
    """

    seconds: float = 1.0
    memory: int = 512 << 20
    output: int = 8 << 20


class TemplatePool(WorkerPool):
    """Render templates in worker processes; safe to use from many threads.

    Args:
        sources: Jinja source by name.
        limits: what one rendering may use.
        workers: processes at most.
        queue_s: how long a request waits for a free process.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        limits: TemplateLimits,
        *,
        workers: int = 2,
        queue_s: float = 10.0,
    ) -> None:
        super().__init__(
            "oxillama_torch.tokenizer.template_worker",
            {"sources": dict(sources), **asdict(limits)},
            seconds=limits.seconds,
            what="chat-template",
            workers=workers,
            queue_s=queue_s,
        )

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request to a worker and return its answer; as ``ask``."""
        return self.ask(request)
