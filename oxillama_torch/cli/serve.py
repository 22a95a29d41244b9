"""``oxillama serve``."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.cli.open_llm import open_llm
from oxillama_torch.cli.options import (
    ContextOption,
    DeviceOption,
    DraftModelOption,
    DraftTokensOption,
    DtypeOption,
    GraphsOption,
    KernelPathOption,
    KernelsOption,
    KVDtypeOption,
    ModelOption,
    NumericsOption,
    PreemptionOption,
    SpeculationOption,
    ThreadsOption,
    TunedOption,
    engine_config,
)
from oxillama_torch.config import ServerConfig, from_environment
from oxillama_torch.engine.loading import open_model

__all__ = ["serve"]

_SERVER_FAILED = 5


def serve(
    model: ModelOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (8080).")] = None,
    alias: Annotated[str | None, typer.Option(help="The model's name in the API.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KVDtypeOption = None,
    numerics: NumericsOption = None,
    graphs: GraphsOption = None,
    kernels: KernelsOption = None,
    kernel_path: KernelPathOption = None,
    tuned: TunedOption = None,
    preemption: PreemptionOption = None,
    ctx_size: ContextOption = None,
    threads: ThreadsOption = None,
    speculation: SpeculationOption = None,
    draft_model: DraftModelOption = None,
    draft_tokens: DraftTokensOption = None,
    max_batch_size: Annotated[
        int | None, typer.Option(help="Most requests running at once.")
    ] = None,
    max_streams: Annotated[int | None, typer.Option(help="Most HTTP requests at once.")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Accept this bearer key; may be repeated.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="Load an adapter, NAME=PATH; may be repeated.")
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Let /admin/loras load adapters from this folder.")
    ] = None,
    admin_token: Annotated[str | None, typer.Option(help="Bearer token of /admin.")] = None,
    processor: Annotated[
        list[str] | None,
        typer.Option(
            help="Let requests name a processor, NAME=FILE.py:FUNCTION or NAME=MODULE:FUNCTION."
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Keep responses and files: SQLite file or PostgreSQL URL.")
    ] = None,
    blobs: Annotated[
        Path | None, typer.Option(help="Folder of files' contents (beside the SQLite file).")
    ] = None,
    load: Annotated[
        list[str] | None, typer.Option(help="Serve a further model, NAME=PATH; may be repeated.")
    ] = None,
    model_root: Annotated[
        Path | None, typer.Option(help="Let /admin/models load models from this folder.")
    ] = None,
    max_models: Annotated[int | None, typer.Option(help="Most models loaded at once (4).")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Accept the keys of this file, read again on change.")
    ] = None,
    jwt_key: Annotated[
        Path | None, typer.Option(help="Accept JSON web tokens: file with secret or public key.")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Limit per key.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Limit per key.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Let pages of this origin in; may be repeated.")
    ] = None,
    access_log: Annotated[
        str | None, typer.Option(help="File for a JSON line per request; - for stderr.")
    ] = None,
) -> None:
    """Serve an OpenAI-compatible API."""
    engine = engine_config(
        model,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        numerics=numerics,
        graphs=graphs,
        kernels=kernels,
        kernel_path=kernel_path,
        tuned=tuned,
        preemption=preemption,
        max_context=ctx_size,
        threads=threads,
        speculation=speculation,
        draft_model=draft_model,
        draft_tokens=draft_tokens,
        max_batch_size=max_batch_size,
    )
    given = {
        "host": host,
        "port": port,
        "model_alias": alias,
        "max_streams": max_streams,
        "api_keys": tuple(api_key) if api_key else None,
        "loras": tuple(lora) if lora else None,
        "processors": tuple(processor) if processor else None,
        "adapter_root": adapter_root,
        "admin_token": admin_token,
        "store": store,
        "blobs": blobs,
        "models": tuple(load) if load else None,
        "model_root": model_root,
        "max_models": max_models,
        "api_key_file": api_key_file,
        "jwt_key": jwt_key,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "cors_origins": tuple(cors_origin) if cors_origin else None,
        "access_log": access_log,
    }
    given = {name: value for name, value in given.items() if value is not None}
    server = replace(from_environment(ServerConfig()), **given)
    # A bad file ends the command here, with its own exit code, before a worker is forked.
    open_model(engine).close()

    from oxillama_torch.server.run import serve as run_server  # Flask only where it is needed

    try:
        run_server(server, engine, open_llm)
    except OSError as error:
        reason = error.strerror or error
        print(f"error: cannot listen on {server.host}:{server.port}: {reason}", file=sys.stderr)
        raise typer.Exit(_SERVER_FAILED) from None
