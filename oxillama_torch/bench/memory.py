"""Memory of a GPU: what an engine was planned to take, and what it has taken."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.engine import DEFAULT_BATCH_SIZE
from oxillama_torch.engine.loading import open_model, resolve, uses_graphs
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.models.config import ModelConfig
from oxillama_torch.models.memory import memory_plan

__all__ = ["MemoryWatch", "free_bytes", "planned_bytes"]


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that nobody holds, not counting what torch keeps for later."""
    torch.empty(1, device=device)  # the driver's own part is taken at the first use
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def planned_bytes(config: EngineConfig, kv_tokens: int) -> int:
    """Weights, keys and values, workspace and graphs, by the plan.

    Args:
        config: of the engine.
        kv_tokens: tokens that its pages hold.
    """
    device, dtype, numerics = resolve(config)
    batch_size = config.max_batch_size or DEFAULT_BATCH_SIZE
    with open_model(config) as gguf:
        plan = memory_plan(
            gguf,
            ModelConfig.from_metadata(Metadata(gguf.metadata, str(gguf.path))),
            dtype=dtype,
            kv_dtype=config.kv_dtype,
            max_batch_tokens=config.max_batch_tokens,
            max_batch_size=batch_size,
            graph_lines=batch_size if uses_graphs(config, device) else 0,
            device=device,
            numerics=numerics,
        )
    return plan.total_bytes(kv_tokens)


class MemoryWatch:
    """What an engine takes, from before it is loaded.

    Args:
        config: of the engine.
        free: bytes that a GPU has left.
    """

    def __init__(
        self, config: EngineConfig, free: Callable[[torch.device], int] = free_bytes
    ) -> None:
        self._config, self._free = config, free
        self._device = resolve(config)[0]
        self._before = free(self._device) if self._device.type == "cuda" else None

    def figures(self, kv_tokens: int) -> dict[str, float]:
        """``planned_bytes``, ``used_bytes`` and ``used_beyond_plan``, a share; on a CPU, nothing:
        there other programs live in the same memory.

        Args:
            kv_tokens: tokens that the engine's pages hold.
        """
        if self._before is None:
            return {}
        planned = planned_bytes(self._config, kv_tokens)
        used = self._before - self._free(self._device)
        return {
            "planned_bytes": planned,
            "used_bytes": used,
            "used_beyond_plan": used / planned - 1,
        }
