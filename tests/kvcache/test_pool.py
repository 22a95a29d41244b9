"""The pool's tensors and their number, against sizes computed by hand."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.errors import EngineError
from oxillama_torch.kernels import kv_formats
from oxillama_torch.kvcache import pool as pool_module
from oxillama_torch.kvcache.pool import KVPool, page_bytes, plan_pages

SHAPES = [(2, 8, 4), (1, 16, 16)]
CPU = torch.device("cpu")
HALF = kv_formats.find("f16", torch.float32)


def test_layers_have_their_own_shapes_and_start_at_zero():
    pool = KVPool(SHAPES, num_pages=3, page_size=16, format=HALF, device="cpu")
    shapes = [(tuple(k.shape), tuple(v.shape)) for k, v in pool.layers]
    assert shapes == [((3, 16, 2, 8), (3, 16, 2, 4)), ((3, 16, 1, 16), (3, 16, 1, 16))]
    assert not any(tensor.any() for pair in pool.layers for tensor in pair)
    assert pool.nbytes == 3 * page_bytes(SHAPES, 16, HALF) == 3 * 16 * 56 * 2


def test_clear_touches_only_the_named_pages():
    pool = KVPool(SHAPES, num_pages=4, page_size=16, format=HALF, device="cpu")
    for pair in pool.layers:
        for tensor in pair:
            tensor.fill_(torch.nan)
    pool.clear([1, 3])
    for pair in pool.layers:
        for tensor in pair:
            assert not tensor[[1, 3]].any() and tensor[[0, 2]].isnan().all()


@pytest.mark.parametrize(("name", "size"), [("fp8", 64), ("q8_0", 68), ("q4_0", 36)])
def test_packed_pages_are_counted_and_cleared(name, size):
    shapes, format = [(3, 64, 32)], kv_formats.find(name, torch.float32)
    pool = KVPool(shapes, num_pages=4, page_size=16, format=format, device="cpu")
    k_pages, v_pages = pool.layers[0]
    assert k_pages.shape == (4, 16, 3, size) and v_pages.shape == (4, 16, 3, size // 2)
    assert pool.nbytes == 4 * page_bytes(shapes, 16, format) == 4 * 16 * 3 * size * 3 // 2
    for pages in pool.layers[0]:
        assert not kv_formats.decode(pages, format).any(), "zero bytes are zeros"
        kv_formats.raw(pages).fill_(255)
    pool.clear([0, 2])
    for pages, dim in zip(pool.layers[0], (64, 32)):
        values = kv_formats.decode(pages, format)
        assert values.shape == (4, 16, 3, dim)
        assert not values[[0, 2]].any() and values[[1, 3]].isnan().all()


def test_number_of_pages_by_count_by_memory_and_by_need():
    plan = lambda **options: plan_pages(  # noqa: E731
        EngineConfig(page_size=16, **options), 1000, CPU, useful_tokens=320
    )
    assert plan(kv_pages=7) == 7
    assert plan(kv_memory_bytes=5999) == 5
    assert plan(kv_memory_bytes=10**9) == 20, "more than can be used is not allocated"
    with pytest.raises(EngineError, match="no memory for KV pages"):
        plan(kv_memory_bytes=999)


def test_free_memory_bounds_the_default(monkeypatch):
    monkeypatch.setattr(pool_module, "_free_bytes", lambda device: 40_000)
    pages = plan_pages(EngineConfig(page_size=16), 1000, CPU, useful_tokens=10**6)
    assert pages == 10, "a quarter of what is free"
