"""``oxillama bench kernels`` and ``oxillama bench compare``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from oxillama_torch.bench.ceilings import measure_ceilings
from oxillama_torch.bench.compare import compare
from oxillama_torch.bench.kernel_table import SHAPES, Row, kernel_table
from oxillama_torch.bench.report import machine
from oxillama_torch.cli.options import KernelPathOption
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import formats, registry

__all__ = ["bench_kernels", "compare_runs"]


def bench_kernels(
    types: Annotated[str, typer.Option(help="GGML types, or all.")] = "q8_0,q4_k,q6_k",
    m: Annotated[str, typer.Option("--m", help="Numbers of rows.")] = "1,16",
    shape: Annotated[str, typer.Option(help=f"{', '.join(SHAPES)}, or NxK.")] = "llama-1b-up",
    backends: Annotated[
        str | None, typer.Option(help="Only these; default: all that serve but reference.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    seconds: Annotated[float, typer.Option(help="To measure each.", min=0)] = 0.2,
    out: Annotated[Path | None, typer.Option("--json", help="Keep the figures.")] = None,
    kernel_path: KernelPathOption = None,
) -> None:
    """Check and time matmul kernels: microseconds, bandwidth, share of the measured ceilings."""
    if kernel_path is not None:
        registry.load_file(kernel_path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = formats.known() if types == "all" else [formats.get(t).name for t in types.split(",")]
    ceilings = measure_ceilings(device)
    typer.echo(
        f"{machine()}\nceilings here: copy {ceilings.copy / 1e9:,.1f} GB/s, "
        f"{ceilings.matmul_dtype} matmul {ceilings.matmul / 1e12:,.2f} TFLOP/s"
    )
    rows = list(
        kernel_table(
            names,
            [int(rows) for rows in m.split(",")],
            _shape(shape),
            ceilings,
            device=device,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            backends=backends.split(",") if backends else None,
            seconds=seconds,
        )
    )
    _print(rows)
    if out is not None:
        facts = {"machine": machine(), "ceilings": asdict(ceilings)}
        facts["rows"] = [row.as_dict() for row in rows]
        out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def compare_runs(
    before: Annotated[Path, typer.Argument(help="JSON of an earlier run.")],
    after: Annotated[Path, typer.Argument(help="JSON of a later one.")],
) -> None:
    """Say what moved beyond the spread between two runs of ``bench kernels --json``."""
    old, new = (json.loads(path.read_text(encoding="utf-8"))["rows"] for path in (before, after))
    changes, single = compare(old, new)
    table = Table("kernel", "before µs", "after µs", "ratio", "")
    for change in changes:
        name = "{} {} M={} N={} K={}".format(*change.key)
        verdict = "" if not change.moved else "slower" if change.ratio > 1 else "faster"
        figures = (f"{change.before:,.1f}", f"{change.after:,.1f}", f"{change.ratio:.3f}")
        table.add_row(name, *figures, verdict)
    Console().print(table)
    for key in single:
        typer.echo("in one run only: {} {} M={} N={} K={}".format(*key))


def _shape(text: str) -> tuple[int, int]:
    if text in SHAPES:
        return SHAPES[text]
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal()):
        raise UnsupportedError(f"shape {text!r}", (*SHAPES, "NxK"))
    return int(n), int(k)


def _print(rows: list[Row]) -> None:
    table = Table("type", "M", "backend", "µs", "GB/s", "of copy", "of matmul", "rel. L2", "")
    for row in rows:
        figures = (row.note, "", "", "", "")
        if row.microseconds is not None:
            figures = (
                f"{row.microseconds:,.1f}",
                f"{row.gigabytes_per_s:,.1f}",
                f"{row.share_of_copy:.2f}",
                f"{row.share_of_matmul:.2f}",
                "" if row.relative_l2 is None else f"{row.relative_l2:.1e}",
            )
        chosen = "chosen" if row.chosen else ""
        table.add_row(row.type, str(row.m), row.backend, *figures, chosen)
    Console().print(table)
