"""The tensors behind the page numbers: keys and values of every layer.

Shapes: P pages, S tokens per page, Hkv key/value heads, Dk key size, Dv value size.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.errors import EngineError
from oxillama_torch.kernels.kv_formats import KVFormat, raw

__all__ = ["KVPool", "page_bytes", "plan_pages"]

#: Shares of the memory that is free once the weights are loaded. On a GPU the rest is for
#: activations; on a CPU other programs live in the same memory.
_FREE_SHARE = {"cuda": 0.85, "cpu": 0.25}

LayerShape = tuple[int, int, int]


def page_bytes(shapes: Sequence[LayerShape], page_size: int, format: KVFormat) -> int:
    """Bytes of one page over all layers: ``S * sum(Hkv * (bytes(Dk) + bytes(Dv)))``.

    Args:
        shapes: (Hkv, Dk, Dv) per layer.
        page_size: tokens per page.
        format: of keys and values.

    Raises:
        UnsupportedError: a head's size does not fit the format.
    """
    size = format.row_bytes
    return page_size * sum(heads * (size(key) + size(value)) for heads, key, value in shapes)


def plan_pages(
    config: EngineConfig,
    bytes_per_page: int,
    device: torch.device,
    *,
    useful_tokens: int,
    reserved_bytes: int = 0,
) -> int:
    """How many pages to allocate: ``kv_pages``, else by ``kv_memory_bytes``, else by free memory.

    Args:
        config: the engine's configuration.
        bytes_per_page: as ``page_bytes`` says.
        device: where the pages will live.
        useful_tokens: more than this many tokens can never be in use at once.
        reserved_bytes: of what is free, so much is spoken for.

    Raises:
        EngineError: the memory does not hold a single page.
    """
    if config.kv_pages is not None:
        return config.kv_pages
    budget = config.kv_memory_bytes
    if budget is None:
        budget = int((_free_bytes(device) - reserved_bytes) * _FREE_SHARE[device.type])
    pages = min(budget // max(bytes_per_page, 1), -(-useful_tokens // config.page_size))
    if pages < 1:
        raise EngineError(
            f"no memory for KV pages: one takes {bytes_per_page} bytes, {budget} are to be had"
        )
    return pages


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class KVPool:
    """Keys and values of all pages.

    Args:
        shapes: (Hkv, Dk, Dv) per layer.
        num_pages, page_size: P and S.
        format: how keys and values lie in them.
        device: of the tensors.

    Attributes:
        layers: (k_pages [P, S, Hkv, Dk], v_pages [P, S, Hkv, Dv]) per layer, or as the format
            has it, zero at first: a kernel may read a page beyond a request's last token, and
            0 * NaN is NaN. All zeros are zero in every format.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        num_pages: int,
        page_size: int,
        format: KVFormat,
        device: torch.device | str,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size

        def zeros(heads: int, size: int) -> torch.Tensor:
            shape = (num_pages, page_size, heads, format.row(size))
            return torch.zeros(shape, dtype=format.dtype, device=device)

        self.layers = [
            (zeros(heads, key_size), zeros(heads, value_size))
            for heads, key_size, value_size in shapes
        ]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    def clear(self, pages: Sequence[int]) -> None:
        """Overwrite pages with zeros (after a request that left NaN in them)."""
        if not pages:
            return
        index = torch.tensor(pages, dtype=torch.int64, device=self.layers[0][0].device)
        for k_pages, v_pages in self.layers:
            raw(k_pages).index_fill_(0, index, 0)
            raw(v_pages).index_fill_(0, index, 0)

    def clear_slots(self, slots: torch.Tensor) -> None:
        """Overwrite single tokens' places, int64 [N] as in ``ForwardBatch.slot_mapping``."""
        for k_pages, v_pages in self.layers:
            raw(k_pages).flatten(0, 1).index_fill_(0, slots, 0)
            raw(v_pages).flatten(0, 1).index_fill_(0, slots, 0)
