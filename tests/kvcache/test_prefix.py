"""Prefix cache: what is found is what was stored, even when every hash collides."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from oxillama_torch.kvcache.pages import PageAllocator
from oxillama_torch.kvcache.prefix import PrefixCache

SIZE = 2


def cache_of(num_pages: int = 64, hash=None) -> tuple[PageAllocator, PrefixCache]:
    allocator = PageAllocator(num_pages)
    more = {} if hash is None else {"hash": hash}
    return allocator, PrefixCache(allocator, SIZE, "model", **more)


def store(allocator, cache, tokens, root=None) -> list[int]:
    """Allocate and record the full pages of ``tokens``; returns the page numbers recorded."""
    parent, pages = root or cache.root((), ""), []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        page = allocator.allocate(1)[0]
        entry = cache.insert(parent, tuple(tokens[start : start + SIZE]), page)
        if entry is None:
            return pages
        parent = entry
        pages.append(entry.page)
    return pages


def found(cache, tokens, limit=None, root=None) -> list[int]:
    root = root or cache.root((), "")
    return [e.page for e in cache.match(root, tokens, len(tokens) if limit is None else limit)]


def test_finds_the_longest_common_run_of_full_pages():
    allocator, cache = cache_of()
    pages = store(allocator, cache, [1, 2, 3, 4, 5, 6, 7])
    assert found(cache, [1, 2, 3, 4, 5, 6, 7, 8]) == pages
    assert found(cache, [1, 2, 3, 4, 9, 9]) == pages[:2]
    assert found(cache, [3, 4, 5, 6]) == []
    assert found(cache, [1]) == []


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (6, 3)])
def test_never_matches_beyond_the_limit(limit, expected):
    allocator, cache = cache_of()
    store(allocator, cache, [1, 2, 3, 4, 5, 6])
    assert len(found(cache, [1, 2, 3, 4, 5, 6], limit)) == expected


def test_adapters_and_salt_separate():
    allocator, cache = cache_of()
    roots = [
        cache.root((), ""),
        cache.root((), "a"),
        cache.root((("x", 1.0),), ""),
        cache.root((("x", 0.5),), ""),
        cache.root((("y", 1.0),), ""),
    ]
    for number, root in enumerate(roots):
        assert all(not found(cache, [1, 2], root=other) for other in roots[number:])
        store(allocator, cache, [1, 2], root)


def test_same_tokens_under_another_parent_are_another_page():
    allocator, cache = cache_of()
    first = store(allocator, cache, [1, 2, 8, 8])
    second = store(allocator, cache, [3, 4, 8, 8])
    assert found(cache, [3, 4, 8, 8]) == second and first[1] != second[1]


def test_a_page_stored_twice_is_the_first_one():
    allocator, cache = cache_of()
    assert store(allocator, cache, [1, 2]) == store(allocator, cache, [1, 2])


def test_eviction_forgets():
    allocator, cache = cache_of(num_pages=3)
    pages = store(allocator, cache, [1, 2, 3, 4, 5, 6])
    for page in reversed(pages):
        allocator.release(page, keep=page in cache)
    allocator.allocate(1)
    assert found(cache, [1, 2, 3, 4, 5, 6]) == pages[:2], "the deepest page goes first"
    cache.clear()
    assert found(cache, [1, 2]) == [] and allocator.free == 2 and len(cache) == 0


@pytest.mark.parametrize("hash", [lambda data: b"", lambda data: data[-1:]], ids=["one", "weak"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_colliding_hash_never_hands_out_a_wrong_page(hash, data):
    """Every page found must have been stored for exactly the tokens up to its end."""
    allocator, cache = cache_of(hash=hash)
    contents: dict[int, tuple[int, ...]] = {}
    prompts = st.lists(st.integers(0, 2), min_size=2, max_size=8)
    for tokens in data.draw(st.lists(prompts, min_size=1, max_size=8)):
        for index, page in enumerate(found(cache, tokens)):
            assert contents[page] == tuple(tokens[: (index + 1) * SIZE])
        for index, page in enumerate(store(allocator, cache, tokens)):
            contents.setdefault(page, tuple(tokens[: (index + 1) * SIZE]))
