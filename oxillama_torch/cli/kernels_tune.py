"""``oxillama kernels tune``: the fastest tile sizes of the matmul kernels on this GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from oxillama_torch.bench.kernel_table import parse_rows, parse_shapes
from oxillama_torch.bench.tune import Job, Tuned, as_table, jobs, tune
from oxillama_torch.cli.console import table_console
from oxillama_torch.kernels import formats

__all__ = ["tune_kernels"]


def tune_kernels(
    types: Annotated[str, typer.Option(help="GGML types, or all.")] = "q4_k,q6_k,q8_0",
    m: Annotated[str, typer.Option("--m", help="Numbers of rows.")] = "1,4,16,64,512",
    shapes: Annotated[
        str, typer.Option("--shapes", help="As for bench kernels, such as llama-8b or NxK.")
    ] = "llama-8b",
    device: Annotated[str | None, typer.Option(help="cuda or cuda:N.")] = None,
    seconds: Annotated[float, typer.Option(help="To measure each config.", min=0)] = 0.05,
    most: Annotated[int | None, typer.Option(help="Configs per case; default: all.", min=1)] = None,
    out: Annotated[Path, typer.Option("--json", help="The table.")] = Path("tuned.json"),
) -> None:
    """Time tile sizes and keep the fastest in a table for --tuned. Takes minutes to hours."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = formats.known() if types == "all" else [formats.get(t).name for t in types.split(",")]
    work = jobs(names, parse_rows(m), parse_shapes(shapes))
    found: list[Tuned] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        whole = bar.add_task("", total=len(work))

        def show(job: Job, done: int, total: int) -> None:
            what = f"{job.kernel} {job.type} {job.n}x{job.k} M={job.m}: config {done + 1}/{total}"
            bar.update(whole, description=what)

        for tuned in tune(work, device, seconds=seconds, most=most, progress=show):
            found.append(tuned)
            bar.advance(whole)
            # After each: hours of work outlive an interruption.
            out.write_text(json.dumps(as_table(found, device), indent=1) + "\n", encoding="utf-8")
    _print(found)
    typer.echo(f"wrote {out}; use it with --tuned {out}")


def _print(found: list[Tuned]) -> None:
    table = Table(
        "kernel", "type", "N", "K", "M", "config", "µs", "default µs", "faster", "tried", box=None
    )
    for tuned in found:
        job, c = tuned.job, tuned.config
        table.add_row(
            *(job.kernel, job.type, str(job.n), str(job.k), str(job.m)),
            f"{c.block_m}x{c.block_n}x{c.block_k}, {c.num_warps} warps, {c.num_stages} stages",
            f"{tuned.microseconds:,.1f}",
            f"{tuned.default_microseconds:,.1f}",
            f"{tuned.default_microseconds / tuned.microseconds:.2f}x",
            f"{tuned.tried}" + (f" ({tuned.refused} refused)" if tuned.refused else ""),
        )
    table_console().print(table)
