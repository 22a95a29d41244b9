"""Options that several commands share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.config import EngineConfig, from_environment

__all__ = [
    "ContextOption",
    "DeviceOption",
    "DraftModelOption",
    "DraftTokensOption",
    "DtypeOption",
    "GraphsOption",
    "KVDtypeOption",
    "KernelPathOption",
    "KernelsOption",
    "ModelOption",
    "NumericsOption",
    "PreemptionOption",
    "SpeculationOption",
    "ThreadsOption",
    "TunedOption",
    "engine_config",
]

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", "-m", help="GGUF file; without it the demo model in the package."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="auto (the GPU when there is one), cpu, cuda or cuda:N.")
]
DtypeOption = Annotated[
    str | None, typer.Option(help="Activations: auto, float32, bfloat16 or float16.")
]
KVDtypeOption = Annotated[
    str | None,
    typer.Option(help="Keys and values: auto (as activations), f32, f16, bf16, fp8, q8_0 or q4_0."),
]
NumericsOption = Annotated[
    str | None,
    typer.Option(help="invariant (same bits in any batch), fast, or auto (by device)."),
]
GraphsOption = Annotated[
    str | None,
    typer.Option(help="Replay decode steps as CUDA graphs: on, off or auto (on a GPU)."),
]
KernelsOption = Annotated[
    str | None, typer.Option(help='Kernel rules, such as "attention=reference"; commas between.')
]
KernelPathOption = Annotated[
    Path | None, typer.Option(help="Python file that registers kernels of your own.")
]
TunedOption = Annotated[
    Path | None, typer.Option("--tuned", help="Table of tile sizes, from oxillama kernels tune.")
]
PreemptionOption = Annotated[
    str | None,
    typer.Option(
        help="A request that makes room for another loses its pages (recompute) "
        "or has them kept in host memory (swap)."
    ),
]
ContextOption = Annotated[
    int | None, typer.Option("--ctx-size", "-c", help="Most tokens of prompt and answer together.")
]
SpeculationOption = Annotated[
    str | None,
    typer.Option(help="What guesses tokens ahead: none, lookup (the text so far) or draft."),
]
DraftModelOption = Annotated[
    Path | None, typer.Option(help="GGUF file that guesses, with --speculation draft.")
]
DraftTokensOption = Annotated[
    int | None, typer.Option(help="Most guesses per step (8 for lookup, 4 for draft).")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", "-t", help="CPU threads.")]


def engine_config(model: Path | None, **options: object) -> EngineConfig:
    """Options that were given, over ``OXILLAMA_*`` variables, over defaults.

    Raises:
        FileNotFoundError: there is no such model file.
    """
    for path in (model, options.get("draft_model")):
        if path is not None and not path.exists():
            raise FileNotFoundError(2, "no such model file", str(path))
    given = {name: value for name, value in options.items() if value is not None}
    if model is not None:
        given["model"] = model
    return replace(from_environment(EngineConfig()), **given)
