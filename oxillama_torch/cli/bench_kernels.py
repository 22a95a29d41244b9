"""``oxillama bench kernels`` and ``oxillama bench compare``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from oxillama_torch.bench.cases import PACKED_OPS, known_ops
from oxillama_torch.bench.ceilings import Ceilings, measure_ceilings
from oxillama_torch.bench.compare import compare
from oxillama_torch.bench.compiled_facts import compiled_facts, untimed_rows, with_facts
from oxillama_torch.bench.kernel_table import (
    BASELINES,
    SHAPES,
    Row,
    kernel_table,
    parse_rows,
    parse_shapes,
)
from oxillama_torch.bench.plot import check_picture, plot_table
from oxillama_torch.bench.report import machine
from oxillama_torch.cli.console import table_console
from oxillama_torch.cli.options import KernelPathOption, TunedOption
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import formats, registry
from oxillama_torch.kernels.quant_matmul import tuned

__all__ = ["bench_kernels", "compare_runs"]


def bench_kernels(
    op: Annotated[str, typer.Option(help="Which op, or all.")] = "quant_matmul",
    types: Annotated[str, typer.Option(help="GGML types, or all.")] = "q8_0,q4_k,q6_k",
    m: Annotated[str, typer.Option("--m", help="Numbers of rows.")] = "1,16",
    shapes: Annotated[
        str,
        typer.Option(
            "--shapes",
            "--shape",
            help=f"Of {', '.join(SHAPES)}; llama-8b for all of its; or NxK.",
        ),
    ] = "llama-1b-up",
    backends: Annotated[
        str | None, typer.Option(help="Only these; default: all that serve but reference.")
    ] = None,
    against: Annotated[
        str, typer.Option(help="Baselines: reference, dense (torch's own product), or none.")
    ] = "dense",
    sass: Annotated[
        int | None,
        typer.Option(help="Also compile for this GPU generation, such as 90, and count."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    seconds: Annotated[float, typer.Option(help="To measure each.", min=0)] = 0.2,
    limit: Annotated[
        float, typer.Option(help="Seconds a case may take; a longer one is named, not timed.")
    ] = 60,
    out: Annotated[Path | None, typer.Option("--json", help="Keep the figures.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them (.png, .svg, .pdf).")] = None,
    kernel_path: KernelPathOption = None,
    table: TunedOption = None,
) -> None:
    """Check and time kernels: microseconds, bandwidth, share of the measured ceilings."""
    if kernel_path is not None:
        registry.load_file(kernel_path)
    if table is not None:
        tuned.use_table(tuned.read_table(table))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ops = known_ops() if op == "all" else _named(op, known_ops(), "op")
    names = formats.known() if types == "all" else [formats.get(t).name for t in types.split(",")]
    baselines = [] if against == "none" else _named(against, BASELINES, "baseline")
    ms, sizes = parse_rows(m), parse_shapes(shapes)
    _check(ops, names, sizes, backends, plot)
    ceilings = measure_ceilings(device)
    typer.echo(_setting(ceilings))
    cases = (
        kernel_table(
            names,
            ms,
            shape,
            ceilings,
            device=device,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            op=name,
            backends=backends.split(",") if backends else None,
            baselines=baselines,
            seconds=seconds,
            limit=limit,
        )
        for shape in sizes
        for name in ops
    )
    rows: list[Row] = []
    try:
        for row in _shown(itertools.chain.from_iterable(cases)):
            rows.append(row)
        if sass is not None:
            if device == "cpu" and "quant_matmul" in ops:
                rows[:0] = [row for shape in sizes for row in untimed_rows(names, ms, shape)]
            rows[:] = _compiled(rows, sass)
    finally:  # hours of measuring are not lost to a Ctrl-C, or to the last kernel's fault
        if rows:
            table_console().print(_table(rows))
            _keep(rows, ceilings, out, plot)
    if not rows:
        raise UnsupportedError(f"timing {backends} on {device}: none serves any of these calls")


def compare_runs(
    before: Annotated[Path, typer.Argument(help="JSON of an earlier run.")],
    after: Annotated[Path, typer.Argument(help="JSON of a later one.")],
) -> None:
    """Say what moved beyond the spread between two runs of ``bench kernels --json``."""
    changes, single = compare(_rows_of(before), _rows_of(after))
    table = Table("kernel", "before µs", "after µs", "ratio", "")
    for change in changes:
        verdict = "" if not change.moved else "slower" if change.ratio > 1 else "faster"
        figures = (f"{change.before:,.1f}", f"{change.after:,.1f}", f"{change.ratio:.3f}")
        table.add_row(change.name, *figures, verdict)
    table_console().print(table)
    for name in single:
        typer.echo(f"in one run only: {name}")


def _rows_of(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError):
        kinds = ("what bench kernels --json wrote",)
        raise UnsupportedError(f"comparing {path.name}, which has no rows", kinds) from None


def _named(text: str, known: tuple[str, ...], what: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UnsupportedError(f"{what} {name!r}", known)
    return names


def _check(
    ops: Iterable[str],
    types: Iterable[str],
    shapes: Iterable[tuple[int, int]],
    backends: str | None,
    plot: Path | None,
) -> None:
    """Refuse what cannot be done before minutes are spent on the rest."""
    for backend in backends.split(",") if backends else ():
        registry.check_backend(backend, ops)
    if {*PACKED_OPS} & {*ops}:
        for (_, columns), type in itertools.product(shapes, types):
            formats.get(type).check_columns(columns)
    if plot is not None:
        check_picture(plot)


def _shown(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, with the last one on the screen while the next is measured."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("first kernel", total=None)
        for row in rows:
            done = f"{row.op} {row.type} {row.n}x{row.k} M={row.m} {row.backend}: done"
            bar.update(task, description=done)
            yield row


def _setting(ceilings: Ceilings) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    return (
        f"{facts}\nceilings here: copy {ceilings.copy / 1e9:,.1f} GB/s, "
        f"{ceilings.matmul_dtype} matmul {ceilings.matmul / 1e12:,.2f} TFLOP/s"
    )


def _compiled(rows: list[Row], capability: int) -> list[Row]:
    reports = compiled_facts(rows, capability)
    return [with_facts(row, reports) for row in rows]


def _keep(rows: list[Row], ceilings: Ceilings, out: Path | None, plot: Path | None) -> None:
    if out is not None:
        facts = {"machine": machine(), "ceilings": asdict(ceilings)}
        facts["rows"] = [row.as_dict() for row in rows]
        out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if plot is not None and any(row.microseconds is not None for row in rows):
        plot_table(rows, _setting(ceilings), plot)


def _table(rows: list[Row]) -> Table:
    """A table with the columns that some row has."""
    columns = list(_columns(rows))
    table = Table(*(head for head, _ in columns), box=None)
    for row in rows:
        cells = [cell(row) for _, cell in columns]
        if row.microseconds is None and row.note:  # in place of the time
            cells[[head for head, _ in columns].index("µs")] = row.note
        table.add_row(*cells)
    return table


def _columns(rows: list[Row]) -> Iterator[tuple[str, object]]:
    """(heading, row -> cell)."""

    def figure(field: str, form: str):
        return lambda row: "" if getattr(row, field) is None else format(getattr(row, field), form)

    yield "op", lambda row: " ".join(filter(None, (row.op, row.label)))
    for head, field in (("type", "type"), ("M", "m"), ("N", "n"), ("K", "k"), ("backend",) * 2):
        yield head, lambda row, field=field: str(getattr(row, field))
    for head, field, form in (
        ("µs", "microseconds", ",.1f"),
        ("GB/s", "gigabytes_per_s", ",.1f"),
        ("TFLOP/s", "teraflops", ",.3g"),
        ("of copy", "share_of_copy", ".2f"),
        ("of matmul", "share_of_matmul", ".2f"),
        ("x reference", "times_reference", ".2f"),
        ("x dense", "times_dense", ".2f"),
        ("rel. L2", "relative_l2", ".1e"),
        ("regs", "registers", "d"),
        ("spills", "spills", "d"),
        ("shared", "shared_bytes", ",d"),
        ("instr/weight", "instructions_per_weight", ".2f"),
    ):
        if field == "microseconds" or any(getattr(row, field) is not None for row in rows):
            yield head, figure(field, form)
    yield "", lambda row: "chosen" if row.chosen else ""
    if any(row.microseconds is not None and row.note for row in rows):
        yield "note", lambda row: "" if row.microseconds is None else row.note
