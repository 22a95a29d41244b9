"""Opening a model with its progress shown, where somebody is there to see it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
)
from rich.text import Text

from oxillama_torch.config import EngineConfig

if TYPE_CHECKING:
    from oxillama_torch.llm import LLM

__all__ = ["open_llm"]


def open_llm(config: EngineConfig) -> LLM:
    """``LLM.from_config`` with a bar on stderr, which is gone when the model is there."""
    from oxillama_torch.llm import LLM  # imports torch: not for --help

    columns = (TextColumn("{task.description}"), BarColumn(), _Counts())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        loading = bar.add_task(f"loading {config.model_path.name}", total=None, bytes=True)

        def progress(done: int, total: int) -> None:
            bar.update(loading, completed=done, total=total)

        def recording(done: int, total: int) -> None:
            if done == 1:
                bar.add_task("recording CUDA graphs", total=total, bytes=False)
            bar.update(bar.task_ids[-1], completed=done)

        return LLM.from_config(config, progress, recording)


class _Counts(DownloadColumn):
    """How far a task is: in bytes, or in things."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.fields["bytes"] else _COUNTED.render(task)


_COUNTED = MofNCompleteColumn()
