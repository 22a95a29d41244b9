"""``oxillama run``: continue a prompt and print the text as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.cli.open_llm import open_llm
from oxillama_torch.cli.options import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    GraphsOption,
    KernelPathOption,
    KernelsOption,
    KVDtypeOption,
    ModelOption,
    NumericsOption,
    ThreadsOption,
    TunedOption,
    engine_config,
)
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["run"]


def run(
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    stdin: Annotated[bool, typer.Option("--stdin", help="Read the prompt from stdin.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=0)] = 256,
    temperature: Annotated[float, typer.Option("--temperature", "--temp")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 0,
    min_p: Annotated[float, typer.Option()] = 0.0,
    repeat_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", "-s")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    kv_dtype: KVDtypeOption = None,
    numerics: NumericsOption = None,
    graphs: GraphsOption = None,
    kernels: KernelsOption = None,
    kernel_path: KernelPathOption = None,
    tuned: TunedOption = None,
    ctx_size: ContextOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Continue a prompt; the text alone goes to stdout."""
    text = _prompt(prompt, file, stdin)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        seed=seed,
    )
    config = engine_config(
        model,
        device=device,
        dtype=dtype,
        kv_dtype=kv_dtype,
        numerics=numerics,
        graphs=graphs,
        kernels=kernels,
        kernel_path=kernel_path,
        tuned=tuned,
        max_context=ctx_size,
        threads=threads,
        max_batch_size=1,
    )
    with open_llm(config) as llm:
        source = llm.chat_ids([{"role": "user", "content": text}]) if chat else text
        for piece in llm.stream(source, params):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _prompt(prompt: str | None, file: Path | None, stdin: bool) -> str:
    if (prompt is not None) + (file is not None) + stdin != 1:
        raise RequestError("give the prompt by exactly one of --prompt, --file and --stdin")
    if file is not None:
        return file.read_text(encoding="utf-8")
    return sys.stdin.read() if stdin else prompt
