"""``oxillama bench serve``: how a server does under load."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from oxillama_torch.bench.load import Load, apply_load, first_model
from oxillama_torch.cli.console import table_console
from oxillama_torch.cli.options import ModelOption
from oxillama_torch.errors import EngineError, UnsupportedError

__all__ = ["bench_serve"]

_START_S = 600.0
_COLUMNS = {
    "concurrency": "streams",
    "requests": "requests",
    "failed": "failed",
    "ttft_p50_ms": "first token ms",
    "ttft_p99_ms": "p99",
    "gap_p50_ms": "between tokens ms",
    "gap_p99_ms": "p99",
    "gap_max_ms": "max",
    "tokens_s": "tokens/s",
    "of_engine": "of engine",
}


def bench_serve(
    url: Annotated[
        str | None,
        typer.Option(help="Of any OpenAI-compatible server; without it one of ours is started."),
    ] = None,
    model: ModelOption = None,
    model_id: Annotated[str | None, typer.Option(help="Default: the first it lists.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Bearer key.")] = None,
    concurrency: Annotated[str, typer.Option("--concurrency", "-c", help="Streams.")] = "1,4,16,64",
    requests: Annotated[
        int | None, typer.Option(help="Of each; default: twice the streams, at least 8.")
    ] = None,
    prompt_words: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option("--new-tokens", "-n", min=2)] = 64,
    extra: Annotated[
        str | None,
        typer.Option(help='Further fields of each request, as JSON. Ours: {"ignore_eos": true}.'),
    ] = None,
    against_engine: Annotated[
        bool, typer.Option(help="Also run the bare engine on the same file, without HTTP.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Keep the figures.")] = None,
) -> None:
    """Stream chat completions from a server at several concurrencies and time the tokens."""
    if url is not None and (model is not None or against_engine):
        raise UnsupportedError("--url with --model or --against-engine", ("one of them",))
    fields = _fields(extra, ours=url is None)
    sizes = [int(size) for size in concurrency.split(",")]
    rows = []
    with contextlib.ExitStack() as stack:
        if url is None:
            url = stack.enter_context(_own_server(model, max(sizes)))
        name = model_id or first_model(url, api_key)
        for size in sizes:
            load = Load(
                url=url.rstrip("/").removesuffix("/v1"),
                model=name,
                concurrency=size,
                requests=requests or max(8, 2 * size),
                prompt_words=prompt_words,
                new_tokens=new_tokens,
                api_key=api_key,
                extra=fields,
            )
            rows.append(_run(load))
    if against_engine:
        for row in rows:
            row["of_engine"] = row["tokens_s"] / _bare_engine(model, row)
    _print(rows)
    if out is not None:
        from oxillama_torch.bench.report import write_json

        write_json(out, rows)
    if any(row["failed"] for row in rows):
        raise typer.Exit(4)


def _fields(extra: str | None, ours: bool) -> dict:
    if extra is None:
        return {"ignore_eos": True} if ours else {}
    try:
        fields = json.loads(extra)
    except json.JSONDecodeError as error:
        raise UnsupportedError(f"--extra {extra!r}: {error}") from None
    if not isinstance(fields, dict):
        raise UnsupportedError(f"--extra {extra!r}", ("a JSON object",))
    return fields


def _run(load: Load) -> dict:
    """One concurrency, after a warm-up request."""
    apply_load(Load(url=load.url, model=load.model, concurrency=1, requests=1, new_tokens=2,
                    api_key=load.api_key, extra=load.extra))  # fmt: skip
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{load.concurrency} streams", total=load.requests)
        return apply_load(load, lambda done: bar.update(task, completed=done))


@contextlib.contextmanager
def _own_server(model: Path | None, streams: int) -> Iterator[str]:
    """A server of ours in a process of its own. Yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "oxillama_torch.cli", "serve", "--port", str(port)]
    command += ["--max-streams", str(streams + 8)]
    command += ["--model", str(model)] if model is not None else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, f"{url}/health")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen, url: str) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=1)
            return
        time.sleep(0.2)
    raise EngineError(f"the server has not started (exit code {process.poll()})")


def _bare_engine(model: Path | None, row: dict) -> float:
    """Tokens per second of the same requests without a server, in a process of its own."""
    arguments = json.dumps([str(model) if model else None, row["concurrency"], row["requests"],
                            row["prompt_words"], row["new_tokens"]])  # fmt: skip
    command = [sys.executable, "-m", "oxillama_torch.bench.bare_engine", arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _print(rows: list[dict]) -> None:
    columns = {k: v for k, v in _COLUMNS.items() if any(k in row for row in rows)}
    table = Table(*columns.values(), box=None)
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console = table_console()
    console.print(table)
    for row in rows:
        if row["errors"]:
            console.print(f"{row['concurrency']} streams: {row['errors']}", style="red")


def _cell(value: int | float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
