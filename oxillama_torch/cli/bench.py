"""``oxillama bench``: prefill and decode speed and time to the first token, through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.cli.bench_kernels import bench_kernels, compare_runs
from oxillama_torch.cli.bench_model import (
    KeepOption,
    MixOption,
    SyntheticOption,
    model_file,
    print_table,
    progress_bar,
)
from oxillama_torch.cli.bench_serve import bench_serve
from oxillama_torch.cli.bench_sides import bench_e2e, bench_peers
from oxillama_torch.cli.options import (
    DeviceOption,
    DraftModelOption,
    DraftTokensOption,
    DtypeOption,
    GraphsOption,
    KernelsOption,
    KVDtypeOption,
    ModelOption,
    NumericsOption,
    SpeculationOption,
    ThreadsOption,
    TunedOption,
    engine_config,
)

__all__ = ["app"]

_COLUMNS = {
    "model": "model",
    "batch_size": "batch",
    "prompt_tokens": "prompt",
    "new_tokens": "new",
    "load_s": "load s",
    "ttft_s": "first token s",
    "prefill_tok_s": "prefill tok/s",
    "decode_tok_s": "decode tok/s",
}
_ADAPTER_COLUMNS = {
    "adapters": "adapters",
    "bare_decode_tok_s": "decode without",
    "adapter_cost": "longer by",
}
_SPECULATION_COLUMNS = {
    "proposed": "guesses",
    "accepted_share": "right",
    "tokens_per_check": "tokens per check",
}


app = typer.Typer(invoke_without_command=True)


@app.callback()
def bench(
    context: typer.Context,
    model: ModelOption = None,
    synthetic: SyntheticOption = None,
    mix: MixOption = "q4_k_m",
    keep: KeepOption = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", "-p", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2)] = 32,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", "-b", min=1, help="May be repeated.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Medians of this many, after a warm-up.")] = 3,
    adapters: Annotated[
        int, typer.Option(min=0, help="Random adapters that the requests use in turn.")
    ] = 0,
    rank: Annotated[int, typer.Option(min=1, help="Of these adapters.")] = 16,
    json: Annotated[Path | None, typer.Option(help="Write the results here as JSON.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KVDtypeOption = None,
    numerics: NumericsOption = None,
    graphs: GraphsOption = None,
    kernels: KernelsOption = None,
    tuned: TunedOption = None,
    threads: ThreadsOption = None,
    speculation: SpeculationOption = None,
    draft_model: DraftModelOption = None,
    draft_tokens: DraftTokensOption = None,
) -> None:
    """Time a model: prefill and decode in tokens per second, and the first token."""
    if context.invoked_subcommand is not None:
        return
    from oxillama_torch.bench import end_to_end, report  # imports torch: not for --help

    given = {
        "device": device,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "numerics": numerics,
        "graphs": graphs,
        "kernels": kernels,
        "tuned": tuned,
        "threads": threads,
        "speculation": speculation,
        "draft_model": draft_model,
        "draft_tokens": draft_tokens,
    }
    config = engine_config(None, **given)
    options = {name: getattr(config, name) for name in given}
    with model_file(model, synthetic, mix, keep) as path, progress_bar() as bar:
        rows = []
        for size in batch_size or [1]:
            task = bar.add_task(f"{path.name}, batch of {size}", total=None)
            rows.append(
                end_to_end.measure_model(
                    path,
                    batch_size=size,
                    prompt_tokens=prompt_tokens,
                    new_tokens=new_tokens,
                    runs=runs,
                    adapters=adapters,
                    rank=rank,
                    progress=lambda n, total, task=task: bar.update(task, completed=n, total=total),
                    **options,
                )
            )
    columns = _COLUMNS | (_ADAPTER_COLUMNS if adapters else {})
    if config.speculation != "none":
        columns |= _SPECULATION_COLUMNS
    print_table(report.machine(), report.as_table(rows, columns))
    if json is not None:
        report.write_json(json, rows)


app.command("kernels")(bench_kernels)
app.command("compare")(compare_runs)
app.command("serve")(bench_serve)
app.command("e2e")(bench_e2e)
app.command("peers")(bench_peers)
