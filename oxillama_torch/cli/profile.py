"""``oxillama profile``: per layer and op, where the time of a request goes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from oxillama_torch.cli.options import (
    DeviceOption,
    DtypeOption,
    KernelPathOption,
    KernelsOption,
    KVDtypeOption,
    ModelOption,
    NumericsOption,
    ThreadsOption,
    TunedOption,
    engine_config,
)

__all__ = ["profile"]

_PROMPT = "def dedent(text):\n    " + "return text\n    " * 12


def profile(
    model: ModelOption = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What to run.", show_default="a small function")
    ] = _PROMPT,
    new_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=2)] = 16,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write every record.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace (torch.profiler).")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KVDtypeOption = None,
    numerics: NumericsOption = None,
    kernels: KernelsOption = None,
    kernel_path: KernelPathOption = None,
    tuned: TunedOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Show per kernel and layer: calls, time, share, bytes, distance from the roofline."""
    config = engine_config(
        model,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        numerics=numerics,
        kernels=kernels,
        kernel_path=kernel_path,
        tuned=tuned,
        threads=threads,
        max_batch_size=1,
        prefix_cache=False,
        graphs="off",  # kernels are looked at one by one
    )
    from oxillama_torch.bench.ceilings import measure_ceilings  # imports torch: not for --help
    from oxillama_torch.profile.html import page
    from oxillama_torch.profile.run import profile_prompt
    from oxillama_torch.profile.summary import by_kernel, by_layer

    found = profile_prompt(config, prompt, new_tokens, trace)
    ceilings = measure_ceilings(found.setting[0])
    phases = {
        name: (by_kernel(records, ceilings), by_layer(records, ceilings))
        for name, records in found.phases.items()
    }
    machine = dict(zip(("device", "dtype", "numerics"), found.setting))
    machine["tokens"] = f"{found.tokens[0]} prompt, {found.tokens[1]} generated"
    for name, (lines, layers) in phases.items():
        _print(name, lines)
        _print(f"{name}, by layer", layers)
    if html is not None:
        title = f"Profile of {config.model_path.name}"
        html.write_text(page(title, machine, phases, ceilings), encoding="utf-8")
    if out is not None:
        records = {name: [asdict(r) for r in records] for name, records in found.phases.items()}
        facts = {"machine": machine, "ceilings": asdict(ceilings), "records": records}
        out.write_text(json.dumps(facts), encoding="utf-8")


def _print(title: str, lines) -> None:
    table = Table(title, "calls", "ms", "share", "MB", "MFLOP", "roofline")
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(
            line.name.replace("[", r"\["),
            str(line.calls),
            f"{line.seconds * 1e3:,.2f}",
            f"{line.share:.1%}",
            f"{line.nbytes / 1e6:,.1f}",
            f"{line.flops / 1e6:,.1f}",
            f"{line.roofline:.2f}",
        )
    Console().print(table)
