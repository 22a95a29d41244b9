"""How much memory a model will take, known from the file's header alone.

N output rows, K input weights per row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import GGUFFile, TensorInfo
from oxillama_torch.gguf.types import GGMLType, row_bytes
from oxillama_torch.kernels import kv_formats
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.quant_matmul import kept
from oxillama_torch.models.config import ModelConfig

__all__ = ["MemoryPlan", "graph_bytes", "memory_plan"]

_HISTORY = 2048  # engine.decode_state.HISTORY


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by purpose.

    Args:
        weights_bytes: packed weights, norms and biases, padding included; exact.
        kept_bytes: of the weights, in other forms that kernels for CPUs keep beside the packed one.
        kv_bytes_per_token: keys and values of one token in all layers; exact.
        workspace_bytes: activations of a step and logits; an estimate from above.
        graph_bytes: what CUDA graphs work on: lines of requests, and activations
            of their own; an estimate from above. What the driver keeps of each graph is not known
            before: ``graph_bytes`` of the engine's figures has it.
    """

    weights_bytes: int
    kv_bytes_per_token: int
    workspace_bytes: int
    graph_bytes: int = 0
    kept_bytes: int = 0

    def total_bytes(self, kv_tokens: int) -> int:
        """Everything, with pages for ``kv_tokens`` tokens of all requests together."""
        working = self.workspace_bytes + self.graph_bytes
        return self.weights_bytes + self.kept_bytes + working + kv_tokens * self.kv_bytes_per_token


def memory_plan(
    gguf: GGUFFile,
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "auto",
    max_batch_tokens: int = 512,
    max_batch_size: int = 64,
    graph_lines: int = 0,
    device: torch.device | str = "cpu",
    numerics: str = "invariant",
) -> MemoryPlan:
    """Plan the memory of a model before anything of it is loaded.

    Args:
        gguf: the open file; config: what its metadata say.
        dtype: of activations.
        kv_dtype: of keys and values, see EngineConfig.
        max_batch_tokens: tokens of one step.
        max_batch_size: requests of one step, each with a row of logits.
        graph_lines: most requests of a step that is a CUDA graph; 0: there are none.
        device: where the weights go.
        numerics: ``"invariant"`` or ``"fast"``.

    Raises:
        UnsupportedError: a tensor's type has no format, or heads do not fit ``kv_dtype``.
    """
    size = kv_formats.find(kv_dtype, dtype).row_bytes
    head_bytes = size(config.key_dim) + size(config.value_dim)
    return MemoryPlan(
        weights_bytes=sum(_loaded_bytes(info) for info in gguf.tensors.values()),
        kv_bytes_per_token=head_bytes * sum(layer.num_kv_heads for layer in config.layers),
        workspace_bytes=_workspace_bytes(config, max_batch_tokens, max_batch_size),
        graph_bytes=graph_bytes(config, graph_lines) if graph_lines else 0,
        kept_bytes=kept.planned_bytes(
            _matrices(gguf), device=device, dtype=dtype, numerics=numerics
        ),
    )


def graph_bytes(config: ModelConfig, lines: int, prompt_tokens: int = 128) -> int:
    """What CUDA graphs work on, ``MemoryPlan.graph_bytes``.

    Args:
        lines: most requests of a decode step.
        prompt_tokens: most tokens of a prompt that is a graph.
    """
    # Logits and mask by token of the vocabulary; pages, and what penalties look at.
    line = 5 * config.vocab_size + config.context_length // 4 + 12 * _HISTORY
    prompt = (config.hidden_size + 6) * 4 * prompt_tokens
    return lines * line + prompt + _workspace_bytes(config, max(lines, prompt_tokens), lines)


def _matrices(gguf: GGUFFile) -> list[tuple[GGMLType, int, int]]:
    """(type, N, K) of what is multiplied with: the embedding only where there is no other head."""
    return [
        (info.type, *info.shape)
        for name, info in gguf.tensors.items()
        if len(info.shape) == 2
        and (name != "token_embd.weight" or "output.weight" not in gguf.tensors)
    ]


def _loaded_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor once it is loaded: vectors become float32, rows of planes are padded."""
    if len(info.shape) == 1:
        return 4 * info.shape[0]
    try:
        return math.prod(info.shape[:-1]) * _packed_row_bytes(info.type, info.shape[-1])
    except UnsupportedError as error:
        what = f"tensor {info.name!r}: {error.what}"
        raise UnsupportedError(what, error.supported) from None


@functools.cache
def _packed_row_bytes(type: GGMLType, weights: int) -> int:
    data = torch.zeros(row_bytes(type, weights), dtype=torch.uint8)
    return PackedTensor.from_bytes(type, data, (1, weights)).nbytes


def _workspace_bytes(config: ModelConfig, tokens: int, requests: int) -> int:
    """The widest moment of a layer with the reference kernels, which hold most: float32 throughout,
    inputs padded to tiles, and the activation's intermediates besides its inputs."""
    hidden, experts = config.hidden_size, config.experts
    head_dim = max(config.key_dim, config.value_dim)
    widest = 0
    for layer in config.layers:
        attention = 3 * (layer.num_heads + layer.num_kv_heads) * head_dim
        ffn = 5 * layer.intermediate_size
        if experts is not None:
            ffn = experts.used * (ffn + 3 * hidden)  # a row per token and expert, in and out
        widest = max(widest, attention, ffn)
    activations = tokens * (6 * hidden + widest)
    # the logits, and the sorted copy that sampling makes of them
    return 4 * (activations + 2 * requests * config.vocab_size)
