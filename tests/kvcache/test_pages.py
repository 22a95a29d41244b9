"""Page allocator: invariants over random histories (hypothesis), eviction order by hand."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from oxillama_torch.kvcache.pages import PageAllocator

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["allocate", "share", "release", "keep", "forget"]), st.integers(0)),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(num_pages=st.integers(1, 9), operations=OPERATIONS)
def test_every_page_is_in_exactly_one_state(num_pages, operations):
    allocator = PageAllocator(num_pages)
    holds: list[int] = []
    for operation, number in operations:
        if operation == "allocate" and allocator.available:
            page = allocator.allocate(1)[0]
            assert page not in holds, "a page that is held was given out"
            holds.append(page)
        elif operation == "share" and holds:
            allocator.share(holds[number % len(holds)])
            holds.append(holds[number % len(holds)])
        elif operation in ("release", "keep") and holds:
            page = holds.pop(number % len(holds))
            assert allocator.release(page, keep=operation == "keep") == (page not in holds)
        elif operation == "forget":
            allocator.forget(number % num_pages)
        assert allocator.used == len(set(holds))
        assert allocator.free + allocator.cached + allocator.used == num_pages
        assert all(allocator.references(p) == holds.count(p) for p in range(num_pages))


def test_free_pages_go_first_then_cached_ones_oldest_first():
    evicted = []
    allocator = PageAllocator(4, on_evict=evicted.append)
    a, b, c, d = allocator.allocate(4)
    for page in (c, a, b):
        allocator.release(page, keep=True)
    allocator.release(d)
    assert allocator.allocate(1) == [d] and not evicted
    assert allocator.allocate(2) == [c, a] == evicted
    assert (allocator.free, allocator.cached, allocator.used) == (0, 1, 3)


def test_a_cached_page_that_is_used_again_counts_as_recent():
    allocator = PageAllocator(2)
    a, b = allocator.allocate(2)
    allocator.release(a, keep=True)
    allocator.release(b, keep=True)
    allocator.share(a)
    allocator.release(a, keep=True)
    assert allocator.allocate(1) == [b]
