"""The memory of an engine's pages: how many there are, their tensors, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass

from oxillama_torch.config import EngineConfig
from oxillama_torch.engine.model_runner import Model
from oxillama_torch.engine.swapping import Swapping
from oxillama_torch.kernels import kv_formats
from oxillama_torch.kernels.kv_formats import KVFormat
from oxillama_torch.kvcache.holdings import PageManager
from oxillama_torch.kvcache.host_pages import HostPages, plan_host_pages
from oxillama_torch.kvcache.pool import KVPool, page_bytes, plan_pages
from oxillama_torch.kvcache.swap import SwapSpace
from oxillama_torch.models.memory import graph_bytes

__all__ = ["PageMemory", "allocate_pages"]


@dataclass(frozen=True, slots=True)
class PageMemory:
    """Pages by number and as tensors.

    Args:
        pages: who holds which.
        pool: keys and values;  format: how they lie in it.
        swapping, host: the same for host memory; None: preempted requests compute again.
    """

    pages: PageManager
    pool: KVPool
    format: KVFormat
    swapping: Swapping | None
    host: HostPages | None


def allocate_pages(
    model: Model,
    config: EngineConfig,
    *,
    useful_tokens: int,
    identity: str,
    graph_lines: int = 0,
    draft: Model | None = None,
) -> PageMemory:
    """Allocate everything at once.

    Args:
        model: whose keys and values they are.
        config: sizes and format.
        draft: a model whose keys and values lie beside them, in pages of the same numbers.
        useful_tokens: more than this many tokens can never be in use at once.
        graph_lines: of what is free on the device, CUDA graphs of steps with so many requests will
            want some; 0: there are none.
        identity: of the model and all that changes its keys and values.

    Raises:
        EngineError: there is not memory enough.
        UnsupportedError: a head's size does not fit the format.
    """
    shapes, size = model.kv_shapes(), config.page_size
    format = kv_formats.find(config.kv_dtype, model.dtype)
    both = shapes + (draft.kv_shapes() if draft is not None else [])
    graphs = 0
    if graph_lines and config.kv_pages is None:
        graphs = graph_bytes(model.config, graph_lines, config.graph_prompt_tokens)
    count = plan_pages(
        config,
        page_bytes(both, size, format),
        model.device,
        useful_tokens=useful_tokens,
        reserved_bytes=graphs,
    )
    # A draft computes again what has been swapped: it costs little and changes no token.
    host_count = plan_host_pages(config, page_bytes(shapes, size, format), count)
    pages = PageManager(count, size, model=identity, prefix_cache=config.prefix_cache)
    pool = KVPool(shapes, num_pages=count, page_size=size, format=format, device=model.device)
    if not host_count:
        return PageMemory(pages, pool, format, None, None)
    planes = [plane for layer in pool.layers for plane in layer]
    swapping = Swapping(pages, SwapSpace(host_count))
    return PageMemory(pages, pool, format, swapping, HostPages(planes, host_count))
