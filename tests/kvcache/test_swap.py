"""Host pages: numbers by hand, and tensors compared byte by byte with what the pool held."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.config import EngineConfig
from oxillama_torch.errors import EngineError, UnsupportedError
from oxillama_torch.kernels import kv_formats
from oxillama_torch.kvcache.host_pages import HostPages, plan_host_pages
from oxillama_torch.kvcache.pool import KVPool
from oxillama_torch.kvcache.swap import PageCopy, SwapSpace, runs

FORMATS = ["f32", "f16", "bf16", "fp8", "q8_0", "q4_0"]


def test_host_pages_are_given_out_lowest_first_or_not_at_all():
    space = SwapSpace(5)
    assert space.take(2) == [0, 1] and space.take(1) == [2]
    assert space.take(3) is None and space.used == 3
    space.give_back([0, 1])
    assert space.take(4) == [0, 1, 3, 4] and space.take(1) is None and space.take(0) == []


def test_a_copy_is_cut_where_host_pages_do_not_follow():
    copy = PageCopy((9, 3, 7, 5, 1), (2, 3, 4, 8, 9))
    assert list(runs(copy, 64)) == [(2, (9, 3, 7)), (8, (5, 1))]
    assert list(runs(copy, 2)) == [(2, (9, 3)), (4, (7,)), (8, (5, 1))]
    assert list(runs(PageCopy((), ()), 2)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_what_comes_back_is_what_went(name):
    format = kv_formats.find(name, torch.float32)
    shapes = [(2, 32, 64), (3, 96, 32)]
    pool = KVPool(shapes, num_pages=100, page_size=16, format=format, device="cpu")
    planes = [plane for layer in pool.layers for plane in layer]
    bytes_of = [plane.view(torch.uint8) for plane in planes]
    for plane in bytes_of:
        plane.copy_(torch.randint(0, 256, plane.shape, dtype=torch.uint8))
    before = [plane.clone() for plane in bytes_of]
    host = HostPages(planes, 80)
    assert host.nbytes == pool.nbytes * 80 // 100
    gone = tuple(torch.randperm(100)[:70].tolist())
    host.save(PageCopy(gone, tuple(range(5, 75))))
    for plane in bytes_of:
        plane[list(gone)] = 255
    # Other pages than before, and the others untouched.
    back = tuple(reversed(gone))
    host.restore(PageCopy(back, tuple(range(5, 75))))
    others = [page for page in range(100) if page not in gone]
    for plane, old in zip(bytes_of, before):
        assert torch.equal(plane[list(back)], old[list(gone)])
        assert torch.equal(plane[others], old[others])


def test_number_of_host_pages_by_memory_and_by_the_pool():
    plan = lambda **options: plan_host_pages(EngineConfig(**options), 1000, 50)  # noqa: E731
    assert plan() == plan(swap_memory_bytes=9999) == 0, "nothing is swapped by default"
    assert plan(preemption="swap") == 50
    assert plan(preemption="swap", swap_memory_bytes=9999) == 9
    assert plan_host_pages(EngineConfig(preemption="swap"), 1 << 20, 1 << 20) == 4096
    with pytest.raises(EngineError, match="no memory for swapped pages"):
        plan(preemption="swap", swap_memory_bytes=999)


def test_unknown_ways_of_preempting_are_refused():
    with pytest.raises(UnsupportedError, match="preemption 'drop'.*recompute, swap"):
        EngineConfig(preemption="drop")
    with pytest.raises(UnsupportedError, match="swap_memory_bytes"):
        EngineConfig(swap_memory_bytes=0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_copies_on_a_gpu_are_ordered_with_its_work(name):
    """The pages are overwritten behind the copy and read behind the other, without a wait."""
    format = kv_formats.find(name, torch.bfloat16)
    pool = KVPool([(4, 64, 64)] * 2, num_pages=200, page_size=16, format=format, device="cuda")
    planes = [plane for layer in pool.layers for plane in layer]
    bytes_of = [plane.view(torch.uint8) for plane in planes]
    for plane in bytes_of:
        plane.random_(0, 256)
    before = [plane.clone() for plane in bytes_of]
    host = HostPages(planes, 150)
    copy = PageCopy(tuple(range(20, 170)), tuple(range(150)))
    host.save(copy)
    for plane in bytes_of:
        plane.zero_()
    host.restore(copy)
    for plane, old in zip(bytes_of, before):
        assert torch.equal(plane[20:170], old[20:170]) and not plane[:20].any()
