"""What a request holds: taking, growing, sharing and giving back, against counts by hand."""

from __future__ import annotations

from oxillama_torch.kvcache.holdings import PageManager

SIZE = 4


def manager(num_pages=8, prefix_cache=True) -> PageManager:
    return PageManager(num_pages, SIZE, prefix_cache=prefix_cache)


def take(pages: PageManager, tokens, **options):
    return pages.take(tokens, reuse_limit=options.pop("reuse_limit", len(tokens) - 1), **options)


def test_take_gives_pages_for_every_token_or_nothing():
    pages = manager(num_pages=3)
    held, cached = take(pages, list(range(9)))
    assert len(held.pages) == 3 and cached == 0
    assert take(pages, [1]) is None
    assert not pages.grow(held, 13) and len(held.pages) == 3
    pages.give_back(held)
    assert pages.allocator.free == 3


def test_headroom_stays_available():
    pages = manager(num_pages=3)
    assert take(pages, list(range(8)), headroom=2) is None
    assert take(pages, list(range(8)), headroom=1) is not None


def test_a_finished_prompt_is_found_again_but_never_whole():
    pages, tokens = manager(), list(range(8))
    first, _ = take(pages, tokens)
    pages.commit(first, tokens, 8)
    kept = list(first.pages)
    pages.give_back(first)
    assert pages.allocator.cached == 2
    second, cached = take(pages, tokens)
    assert cached == 4 and second.pages[0] == kept[0] and second.pages[1] != kept[1]
    third, cached = take(pages, [*tokens, 9])
    assert cached == 8 and third.pages[:2] == kept
    assert pages.allocator.references(kept[0]) == 2


def test_reuse_limit_zero_computes_everything():
    pages, tokens = manager(), list(range(8))
    held, _ = take(pages, tokens)
    pages.commit(held, tokens, 8)
    assert take(pages, tokens, reuse_limit=0)[1] == 0


def test_cached_pages_that_are_matched_do_not_count_as_room():
    pages, tokens = manager(num_pages=3), list(range(8))
    held, _ = take(pages, tokens)
    pages.commit(held, tokens, 8)
    pages.give_back(held)
    # Two cached pages and a free one: both cached ones are needed themselves.
    assert take(pages, [*tokens, 8, 9, 10, 11, 12]) is None
    assert take(pages, [*tokens, 8]) is not None


def test_equal_prompts_computed_side_by_side_share_afterwards():
    pages, tokens = manager(), list(range(9))
    (first, _), (second, _) = take(pages, tokens), take(pages, tokens)
    assert pages.allocator.used == 6
    second.synced = 3
    pages.commit(first, tokens, 8)
    pages.commit(second, tokens, 8)
    assert first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
    assert pages.allocator.used == 4 and second.synced == 0
    pages.give_back(first)
    pages.give_back(second)
    assert pages.allocator.used == 0


def test_discard_forgets_what_only_this_request_has_seen():
    pages, tokens = manager(), list(range(9))
    (shared, _), (bad, _) = take(pages, tokens), take(pages, [*tokens, 10, 11, 12])
    pages.commit(shared, tokens, 8)
    pages.commit(bad, [*tokens, 10, 11, 12], 12)
    own = bad.pages[2]
    assert pages.discard(bad) == [own]
    pages.give_back(shared)
    assert take(pages, [*tokens, 10, 11, 12, 13])[1] == 8, "the page of tokens 8 to 11 is forgotten"


def test_without_prefix_cache_nothing_is_kept():
    pages, tokens = manager(prefix_cache=False), list(range(8))
    held, _ = take(pages, tokens)
    pages.commit(held, tokens, 8)
    pages.give_back(held)
    assert pages.allocator.free == 8 and take(pages, tokens)[1] == 0
