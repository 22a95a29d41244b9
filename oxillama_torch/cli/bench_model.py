"""What the commands that time a model share: its file, a progress bar, the table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.config import demo_model_path
from oxillama_torch.errors import UnsupportedError

__all__ = [
    "KeepOption",
    "MixOption",
    "SyntheticOption",
    "model_file",
    "print_table",
    "progress_bar",
]

SyntheticOption = Annotated[
    str | None, typer.Option(help="Time random weights of this shape instead: tiny, 1.1b or 8b.")
]
MixOption = Annotated[
    str, typer.Option(help="Types of the synthetic weights: q4_k_m, q8_0 or q4_0.")
]
KeepOption = Annotated[Path | None, typer.Option(help="Write the synthetic file here and keep it.")]


@contextmanager
def model_file(
    model: Path | None, synthetic: str | None, mix: str, keep: Path | None
) -> Iterator[Path]:
    """The file to time; a synthetic one is deleted afterwards unless ``keep`` names it.

    Raises:
        UnsupportedError: both a model and a synthetic one.
        FileNotFoundError: there is no such model file.
    """
    if model is not None and synthetic is not None:
        raise UnsupportedError("--model together with --synthetic", ("one of them",))
    if synthetic is None:
        path = model if model is not None else demo_model_path()
        if not path.exists():
            raise FileNotFoundError(2, "no such model file", str(path))
        yield path
        return
    from oxillama_torch.bench.synthetic import write_synthetic
    from oxillama_torch.engine.own_thread import in_own_thread

    with tempfile.TemporaryDirectory() as folder:
        path = keep if keep is not None else Path(folder) / f"{synthetic}-{mix}.gguf"
        with progress_bar() as bar:
            task = bar.add_task(f"writing {path.name}", total=None)

            def write(check: Callable[[], None]) -> None:
                def progress(done: int, total: int) -> None:
                    check()
                    bar.update(task, completed=done, total=total)

                write_synthetic(path, synthetic, mix, progress=progress)

            in_own_thread(write, "oxillama-synthetic")  # its OpenMP workers must not stay
        yield path


def progress_bar():
    """A progress bar on stderr that leaves nothing behind."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def print_table(machine: dict, cells: list[list[str]]) -> None:
    """Rows, the heading first, and below them what they were measured on."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*cells[0], box=None)
    for row in cells[1:]:
        table.add_row(*row)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), style="dim")
