"""``oxillama bench e2e`` and ``oxillama bench peers``: two sides by turns, and their ratio."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from oxillama_torch.cli.bench_model import (
    KeepOption,
    MixOption,
    SyntheticOption,
    model_file,
    print_table,
    progress_bar,
)
from oxillama_torch.cli.options import (
    DeviceOption,
    DtypeOption,
    KernelsOption,
    ModelOption,
    NumericsOption,
    ThreadsOption,
    engine_config,
)
from oxillama_torch.errors import UnsupportedError

__all__ = ["bench_e2e", "bench_peers"]

_COLUMNS = {
    "side": "side",
    "batch_size": "batch",
    "prefill_tok_s": "prefill tok/s",
    "decode_tok_s": "decode tok/s",
    "prefill_ratio": "prefill: first over this",
    "decode_ratio": "decode: first over this",
}

PromptOption = Annotated[int, typer.Option("--prompt-tokens", "-p", min=1)]
NewOption = Annotated[int, typer.Option("--new-tokens", "-n", min=1, help="After the first one.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Medians of this many, after a warm-up.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Keep the figures.")]


def bench_e2e(
    model: ModelOption = None,
    synthetic: SyntheticOption = None,
    mix: MixOption = "q4_k_m",
    keep: KeepOption = None,
    prompt_tokens: PromptOption = 128,
    new_tokens: NewOption = 32,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", "-b", min=1, help="May be repeated.")
    ] = None,
    rounds: RoundsOption = 3,
    out: JsonOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    kernels: KernelsOption = None,
    threads: ThreadsOption = None,
) -> None:
    """What invariant numerics cost: the engine with fast and with invariant ones, by turns."""
    from oxillama_torch.bench.sides import Ours, by_turns  # imports torch: not for --help

    given = {"device": device, "dtype": dtype, "kernels": kernels, "threads": threads}
    options = _engine_fields(**given)
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    rows: list[dict[str, Any]] = []
    with model_file(model, synthetic, mix, keep) as path, progress_bar() as bar:
        for batch in batch_size or [1]:
            with ExitStack() as stack:
                sides = [
                    stack.enter_context(
                        Ours(path, name, batch_size=batch, numerics=name, **sizes, **options)
                    )
                    for name in ("fast", "invariant")
                ]
                taken = by_turns(sides, rounds, _shown(bar, f"batch of {batch}"))
            rows += [row | {"batch_size": batch} for row in taken]
    _report(rows, sizes, out)


def bench_peers(
    model: ModelOption = None,
    synthetic: SyntheticOption = None,
    mix: MixOption = "q4_k_m",
    keep: KeepOption = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="llama_cpp or oxillama (the wheels); may be repeated. Default: both."),
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="Interpreter that has them; default: this one.")
    ] = None,
    prompt_tokens: PromptOption = 64,
    new_tokens: NewOption = 16,
    rounds: RoundsOption = 3,
    out: JsonOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    numerics: NumericsOption = "fast",
    kernels: KernelsOption = None,
    threads: ThreadsOption = None,
) -> None:
    """The engine and other engines on the same file, by turns, one request at a time."""
    import sys

    import torch

    from oxillama_torch.bench.sides import PEERS, MissingPeer, Ours, Peer, by_turns

    for name in peer or ():
        if name not in PEERS:
            raise UnsupportedError(f"--peer {name}", PEERS)
    options = _engine_fields(
        device=device, dtype=dtype, numerics=numerics, kernels=kernels, threads=threads
    )
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    with model_file(model, synthetic, mix, keep) as path, ExitStack() as stack:
        ours = Ours(path, f"oxillama-torch {numerics}", **sizes, **options)
        sides: list[Any] = [stack.enter_context(ours)]
        own = sizes | {"python": peer_python or sys.executable, "threads": torch.get_num_threads()}
        for name in peer or PEERS:
            try:
                sides.append(stack.enter_context(Peer(path, name, **own)))
            except MissingPeer as error:
                typer.echo(f"{name}: skipped, {error}", err=True)
        bar = stack.enter_context(progress_bar())
        rows = by_turns(sides, rounds, _shown(bar, path.name))
    _report(rows, sizes, out)


def _engine_fields(**options: Any) -> dict[str, Any]:
    """Fields of EngineConfig that were given or stand in the environment."""
    config = engine_config(None, **options)
    return {name: getattr(config, name) for name in options}


def _shown(bar: Progress, what: str):
    task = bar.add_task(what, total=None)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _report(rows: list[dict[str, Any]], sizes: dict[str, int], out: Path | None) -> None:
    from oxillama_torch.bench import report

    columns = {key: heading for key, heading in _COLUMNS.items() if key in rows[0]}
    print_table(report.machine(), report.as_table(rows, columns))
    if out is not None:
        report.write_json(out, [sizes | row for row in rows])
