"""``oxillama info``: what is in a file, and how much memory it will take."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from oxillama_torch.cli.options import KVDtypeOption, NumericsOption
from oxillama_torch.config import EngineConfig, demo_model_path
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.gguf.reader import GGUFFile, read_gguf
from oxillama_torch.gguf.types import TYPE_SIZES
from oxillama_torch.models.config import ModelConfig
from oxillama_torch.models.memory import memory_plan

__all__ = ["info"]

_SHOWN_CHARACTERS = 60
_SHOWN_ITEMS = 4

_Rows = list[tuple[str, ...]]


def info(
    model: Annotated[
        Path | None, typer.Argument(help="GGUF file; without it the demo model in the package.")
    ] = None,
    kv_dtype: KVDtypeOption = None,
    numerics: NumericsOption = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every key.")] = False,
) -> None:
    """Show a model's shape and its memory plan, without loading it."""
    path = model if model is not None else demo_model_path()
    numerics = EngineConfig(numerics=numerics or "auto").numerics  # refused here if it is unknown
    if not path.exists():
        raise FileNotFoundError(2, "no such model file", str(path))
    with read_gguf(path) as file:
        _print_table(_summary(file))
        _print_table(_types(file))
        if metadata:
            _print_table([("key", "value"), *((k, _show(v)) for k, v in file.metadata.items())])
        if tensors:
            _print_table(_tensors(file))
        config = ModelConfig.from_metadata(Metadata(file.metadata, str(path)))
        _print_table(_shape(config))
        _print_table(_memory(file, config, kv_dtype or "auto", numerics))


def _summary(file: GGUFFile) -> _Rows:
    weights = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    return [
        ("file", str(file.path)),
        ("name", _show(file.metadata.get("general.name", ""))),
        ("architecture", file.architecture),
        ("GGUF version", str(file.version)),
        ("weights", f"{weights:,}"),
    ]


def _types(file: GGUFFile) -> _Rows:
    """Tensors, weights and bytes by GGML type, the largest first."""
    by_type = defaultdict(list)
    for tensor in file.tensors.values():
        by_type[tensor.type].append(tensor)
    rows = []
    for type, tensors in by_type.items():
        nbytes = sum(tensor.nbytes for tensor in tensors)
        weights = sum(math.prod(tensor.shape) for tensor in tensors)
        bits = 8 * TYPE_SIZES[type].block_bytes / TYPE_SIZES[type].block_weights
        counts = (f"{len(tensors):,}", f"{weights:,}", f"{nbytes:,}")
        rows.append((nbytes, (type.name, *counts, f"{bits:.2f}")))
    header = ("type", "tensors", "weights", "bytes", "bits per weight")
    return [header, *(row for _, row in sorted(rows, reverse=True))]


def _tensors(file: GGUFFile) -> _Rows:
    rows = [
        (t.name, t.type.name, " x ".join(map(str, t.shape)), f"{t.nbytes:,}")
        for t in file.tensors.values()
    ]
    return [("tensor", "type", "shape", "bytes"), *rows]


def _shape(config: ModelConfig) -> _Rows:
    heads, kv_heads, intermediate = (
        _range([getattr(layer, name) for layer in config.layers])
        for name in ("num_heads", "num_kv_heads", "intermediate_size")
    )
    rope, experts = config.rope, config.experts
    scaled = rope.scaling != "none" and rope.factor != 1.0
    scaling = f", {rope.scaling} x {rope.factor:g}" if scaled else ""
    return [
        ("context", f"{config.context_length:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("layers", str(config.num_layers)),
        ("hidden size", f"{config.hidden_size:,}"),
        ("heads", f"{heads} x {config.key_dim}, {kv_heads} for keys and values"),
        ("feed-forward", intermediate),
        *([("experts", f"{experts.used} of {experts.count}")] if experts else []),
        ("rope", f"{rope.style}, base {rope.theta:g}{scaling}"),
    ]


def _memory(file: GGUFFile, config: ModelConfig, kv_dtype: str, numerics: str) -> _Rows:
    """The plan for the two default activation dtypes."""
    plans = [
        memory_plan(
            file,
            config,
            dtype=dtype,
            kv_dtype=kv_dtype,
            graph_lines=lines,
            device=device,
            numerics=default if numerics == "auto" else numerics,
        )
        for device, dtype, lines, default in (
            ("cpu", torch.float32, 0, "invariant"),
            ("cuda", torch.bfloat16, 64, "fast"),
        )
    ]
    context = config.context_length
    rows = {
        "weights": [plan.weights_bytes for plan in plans],
        "weights, as CPU kernels keep them": [plan.kept_bytes for plan in plans],
        "keys and values, per token": [plan.kv_bytes_per_token for plan in plans],
        f"keys and values, {context:,} tokens": [p.kv_bytes_per_token * context for p in plans],
        "workspace, at most": [plan.workspace_bytes for plan in plans],
        "CUDA graphs, at most": [plan.graph_bytes for plan in plans],
        "one request of full context": [plan.total_bytes(context) for plan in plans],
    }
    header = ("memory", "float32 (CPU)", "bfloat16 (GPU)")
    return [header, *((name, *map(_bytes, values)) for name, values in rows.items())]


def _print_table(rows: _Rows) -> None:
    """Columns two spaces apart; all but the first right-aligned when there are more than two.

    Names come from the file: what a terminal would take for a command is shown escaped.
    """
    rows = [tuple(cell if cell.isprintable() else repr(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        numbers = len(rest) > 1
        cells = [cell.rjust(w) if numbers else cell for cell, w in zip(rest, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *cells]))
    print()


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _show(value: Any) -> str:
    """A metadata value on one line, cut short."""
    if isinstance(value, (list, np.ndarray)):
        items = ", ".join(_show(item) for item in list(value[:_SHOWN_ITEMS]))
        more = ", ..." if len(value) > _SHOWN_ITEMS else ""
        return f"{len(value):,}: [{items}{more}]"
    text = repr(value)[1:-1] if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
