"""``oxillama lora``: what an adapter is, merging it into a model's file, converting it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oxillama_torch.cli.options import ModelOption
from oxillama_torch.config import demo_model_path

if TYPE_CHECKING:
    from oxillama_torch.gguf.reader import GGUFFile
    from oxillama_torch.lora.encode import TensorReport

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

AdapterArgument = Annotated[Path, typer.Argument(help="peft folder or adapter GGUF.")]


@app.command()
def info(adapter: AdapterArgument) -> None:
    """Say what an adapter is: kind, rank, alpha, what it changes, size."""
    from rich.console import Console
    from rich.table import Table

    from oxillama_torch.lora.describe import describe_adapter  # imports torch: not for --help

    found = describe_adapter(adapter)
    targets = ", ".join(f"{name} x {count}" for name, count in found.targets.items())
    table = Table(box=None, show_header=False)
    for row in (
        ("format", found.format),
        ("kind", found.kind),
        ("made for", found.base),
        ("rank", ", ".join(map(str, found.ranks)) or "none"),
        ("alpha", f"{found.alpha:g}"),
        ("changes", targets or "nothing"),
        ("has whole", ", ".join(found.saved) or "nothing"),
        ("size", f"{found.parameters:,} parameters, {found.nbytes:,} bytes"),
    ):
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


@app.command()
def merge(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Argument(help="The GGUF file to write.")],
    model: ModelOption = None,
    scale: Annotated[float, typer.Option(help="Factor of what the adapter changes.")] = 1.0,
    merge_dtype: Annotated[
        str,
        typer.Option(
            help="What touched tensors are kept as: f16, bf16, f32, q8_0, or same: the type they "
            "had where it can be encoded, else f16."
        ),
    ] = "same",
) -> None:
    """Write a model with an adapter in its weights; say what rounding them cost."""
    import math

    from oxillama_torch.errors import RequestError
    from oxillama_torch.lora.adapter import read_adapter
    from oxillama_torch.lora.base import BaseFile
    from oxillama_torch.lora.merge_file import merge_file
    from oxillama_torch.lora.merged import Merge

    if not math.isfinite(scale):
        raise RequestError(f"--scale {scale}", param="scale")
    with _open(model) as gguf, _progress() as bar:
        found = read_adapter(_name(adapter), adapter, BaseFile(gguf))
        task = bar.add_task(f"writing {out.name}", total=None)
        details = merge_file(
            gguf,
            [Merge(found, scale, merge_dtype)],
            out,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print(details)
    print(f"{out}: {out.stat().st_size:,} bytes, {len(details)} matrices changed")


@app.command()
def export(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Argument(help="File to write for a folder, folder for a file.")],
    model: ModelOption = None,
) -> None:
    """Turn a peft folder into an adapter GGUF, or an adapter GGUF into a peft folder.

    The model tells how its file orders rows, and what its architecture is called.
    """
    from oxillama_torch.lora.adapter import read_adapter
    from oxillama_torch.lora.base import BaseFile
    from oxillama_torch.lora.write_gguf import write_adapter_gguf
    from oxillama_torch.lora.write_peft import write_peft_folder

    with _open(model) as gguf:
        base = BaseFile(gguf)
        found = read_adapter(_name(adapter), adapter, base)
        write = write_adapter_gguf if adapter.is_dir() else write_peft_folder
        write(found, out, base)
    print(f"{out}: {len(found.terms)} changes")


def _name(adapter: Path) -> str:
    """What an adapter is called in messages and in the file."""
    return adapter.resolve().name if adapter.is_dir() else adapter.stem


@contextmanager
def _open(model: Path | None) -> Iterator[GGUFFile]:
    from oxillama_torch.gguf.reader import read_gguf

    path = demo_model_path() if model is None else model
    if not path.exists():
        raise FileNotFoundError(2, "no such model file", str(path))
    with read_gguf(path) as gguf:
        yield gguf


def _progress():
    """A progress bar on stderr that leaves nothing behind."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)


def _print(details: list[TensorReport]) -> None:
    """What each matrix became, and its error over its length and over the length of the change."""
    from rich.console import Console
    from rich.table import Table

    table = Table("matrix", "was", "is", "error", "of the change", box=None)
    for entry in details:
        errors = f"{entry.weight_error:.2e}", f"{entry.change_error:.2e}"
        table.add_row(entry.name, entry.type_before, entry.type_after, *errors)
    Console(soft_wrap=True).print(table)
