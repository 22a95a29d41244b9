"""``oxillama kernels``: which kernel serves what, why, and whether it computes what it should."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from oxillama_torch.bench.capture import capture
from oxillama_torch.bench.cases import PACKED_OPS, Case, cases_of, known_ops
from oxillama_torch.bench.kernel_check import Check, check_case
from oxillama_torch.cli.console import table_console
from oxillama_torch.cli.kernels_tune import tune_kernels
from oxillama_torch.cli.options import KernelPathOption, ModelOption
from oxillama_torch.config import EngineConfig, environment
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.kernels import formats, registry
from oxillama_torch.kernels.choices import choices

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

_Op = Annotated[str | None, typer.Option(help="One op only.")]
_Type = Annotated[str | None, typer.Option(help="One GGML type only, such as q4_k.")]
_Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda when there is one.")]
_Rules = Annotated[
    str | None, typer.Option("--kernels", help='Rules, e.g. "quant_matmul.q4_k=triton.gemv".')
]


@app.command("list")
def list_kernels(
    op: _Op = None,
    type: _Type = None,
    device: _Device = None,
    kernels: _Rules = None,
    kernel_path: KernelPathOption = None,
) -> None:
    """Show for every op, type and number of rows which backend serves it, which could, and why."""
    device = _prepare(device, kernels, kernel_path)
    table = Table("op", "numerics", "type", "rows", "backend", "or, when asked for", "why")
    for name in _ops(op):
        for numerics in ("invariant", "fast"):
            for choice in choices(name, device, _DTYPES[device], numerics, _types(type)):
                types = " ".join(choice.types) or type or "any"
                backend = choice.backend or "none"
                others = ", ".join(choice.others)
                table.add_row(name, numerics, types, choice.rows, backend, others, choice.reason)
        table.add_section()
    table_console().print(table)
    for module, reason in registry.missing_modules().items():
        typer.echo(f"left out: {module} ({reason})")


@app.command()
def check(
    op: _Op = None,
    type: _Type = None,
    backend: Annotated[str | None, typer.Option(help="One backend only.")] = None,
    device: _Device = None,
    rows: Annotated[int, typer.Option("--m", help="Rows of the input.", min=1)] = 4,
    outputs: Annotated[int, typer.Option("--n", help="Rows of the weight.", min=1)] = 96,
    inputs: Annotated[int, typer.Option("--k", help="Length of a row.", min=1)] = 512,
    captured: Annotated[
        bool, typer.Option("--captured", help="On what a model's kernels get, not random operands.")
    ] = False,
    model: ModelOption = None,
    prompt: Annotated[
        str, typer.Option(help="What to capture from.", show_default="import os")
    ] = "import os\n",
    kernel_path: KernelPathOption = None,
) -> None:
    """Compare backends with the reference of their op; exit code 4 on a difference."""
    device = _prepare(device, None, kernel_path)
    ops = _ops(op, known_ops())
    if backend is not None:
        registry.check_backend(backend, ops)
    if captured:
        config = EngineConfig(model=model, device=device)
        cases = [case for case in capture(config, prompt) if op in (None, case.op)]
        cases = [case for case in cases if type is None or case.call.type == formats.get(type).name]
    else:
        cases = list(_random_cases(ops, type, device, rows, (outputs, inputs)))
    if _check(cases, backend):
        raise typer.Exit(4)


def _random_cases(
    ops: list[str], type: str | None, device: str, rows: int, shape: tuple[int, int]
) -> Iterator[Case]:
    for name in ops:
        for type_name in _types(type) if name in PACKED_OPS else [None]:
            yield from cases_of(
                name, registry.Call(device, _DTYPES[device], type=type_name, m=rows), shape
            )


def _check(cases: Iterable[Case], backend: str | None) -> bool:
    """Check backends on cases and print a table. Returns: whether one has failed."""
    head = ("op", "backend", "type", "M", "case", "max abs", "rel. L2", "cosine", "NaN", "verdict")
    table, refused, failed = Table(*head, box=None), {}, False
    for case in cases:
        for kernel, _ in registry.candidates(case.op, case.call):
            if kernel.backend == "reference" or backend not in (None, kernel.backend):
                continue
            found = check_case(kernel, case)
            if found.refused is not None:
                refused[case.op, kernel.backend, found.refused] = None
                continue
            failed |= not found.passed
            what = (case.op, kernel.backend, case.call.type or "", str(case.call.m), case.label)
            table.add_row(*what, *_cells(found))
    console = table_console()
    console.print(table)
    for op, name, reason in refused:
        console.print(f"not run: {op} {name} {reason}", style="dim")
    return failed


def _cells(result: Check) -> tuple[str, ...]:
    return (
        f"{result.max_abs:.3g}",
        f"{result.relative_l2:.3g}",
        f"{result.cosine:.6f}",
        str(result.nans),
        "ok" if result.passed else f"relative L2 above {result.bound:.3g}",
    )


def _prepare(device: str | None, rules: str | None, kernel_path: Path | None) -> str:
    if kernel_path is not None:
        registry.load_file(kernel_path)
    registry.set_rules(rules or environment("KERNELS", "") or "")
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in _DTYPES:
        raise UnsupportedError(f"device {device!r}", _DTYPES)
    return device


def _ops(op: str | None, known: tuple[str, ...] | None = None) -> list[str]:
    known = known or tuple(registry.registered_ops())
    if op is not None and op not in known:
        raise UnsupportedError(f"op {op!r}", known)
    return [op] if op else list(known)


def _types(type: str | None) -> list[str]:
    return [formats.get(type).name] if type else formats.known()


app.command("tune")(tune_kernels)
