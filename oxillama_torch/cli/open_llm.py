"""Opening a model with its progress shown, where somebody is there to see it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from oxillama_torch.config import EngineConfig

if TYPE_CHECKING:
    from oxillama_torch.llm import LLM

__all__ = ["open_llm"]


def open_llm(config: EngineConfig) -> LLM:
    """``LLM.from_config`` with a bar on stderr, which is gone when the model is there."""
    from oxillama_torch.llm import LLM  # imports torch: not for --help

    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(config.model_path.name, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return LLM.from_config(config, progress)
