"""The pages one request holds: taking, growing, caching and giving them back. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from oxillama_torch.kvcache.pages import PageAllocator
from oxillama_torch.kvcache.prefix import CachedPage, PrefixCache, PrefixRoot

__all__ = ["HeldPages", "PageManager"]


@dataclass(slots=True)
class HeldPages:
    """Pages of one request, in order of position.

    Args:
        pages: page numbers; token ``i`` lies in ``pages[i // page_size]``.
        tail: entry of the last page known to the prefix cache; None: nothing more will be cached.
        committed: how many leading pages the prefix cache has seen.
        synced: how many leading pages the batch builder has copied into its table.
    """

    pages: list[int] = field(default_factory=list)
    tail: PrefixRoot | CachedPage | None = None
    committed: int = 0
    synced: int = 0


class PageManager:
    """Gives pages to requests and takes them back.

    Args:
        num_pages, page_size: the pool's geometry.
        model: identifies the model in the prefix cache's root.
        prefix_cache: whether full pages are kept and shared.
    """

    def __init__(
        self, num_pages: int, page_size: int, *, model: str = "", prefix_cache: bool = True
    ) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.prefix = PrefixCache(self.allocator, page_size, model) if prefix_cache else None

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def take(
        self,
        token_ids: Sequence[int],
        *,
        reuse_limit: int,
        headroom: int = 0,
        adapters: tuple[tuple[str, float], ...] = (),
        salt: str = "",
    ) -> tuple[HeldPages, int] | None:
        """Pages for all of ``token_ids``, as many of them as possible from the prefix cache.

        Args:
            token_ids: every token the request has so far.
            reuse_limit: tokens from here on must be computed again.
            headroom: pages that have to stay available afterwards.

        Returns: the pages and how many leading tokens they hold already; None: not enough room.
        """
        held, matched = HeldPages(), []
        if self.prefix is not None:
            held.tail = self.prefix.root(adapters, salt)
            matched = self.prefix.match(held.tail, token_ids, reuse_limit)
        revived = sum(1 for entry in matched if self.allocator.references(entry.page) == 0)
        missing = self.pages_for(len(token_ids)) - len(matched)
        if missing + revived + headroom > self.allocator.available:
            return None
        for entry in matched:
            self.allocator.share(entry.page)
        if matched:
            held.tail = matched[-1]
        held.committed = len(matched)
        held.pages = [entry.page for entry in matched] + self.allocator.allocate(missing)
        return held, len(matched) * self.page_size

    def grow(self, held: HeldPages, tokens: int) -> bool:
        """Make room for ``tokens`` tokens in all. False: not enough pages, nothing changed."""
        missing = self.pages_for(tokens) - len(held.pages)
        if missing > self.allocator.available:
            return False
        if missing > 0:
            held.pages += self.allocator.allocate(missing)
        return True

    def shrink(self, held: HeldPages, tokens: int) -> None:
        """Give back pages beyond those for ``tokens`` tokens: what was meant for wrong guesses."""
        kept = self.pages_for(tokens)
        for page in reversed(held.pages[kept:]):
            self.allocator.release(page)
        del held.pages[kept:]
        held.synced = min(held.synced, kept)

    def commit(self, held: HeldPages, token_ids: Sequence[int], computed: int) -> None:
        """Let the prefix cache know the pages that ``computed`` tokens have filled.

        A page whose tokens are cached already is given back in favour of the cached one: equal
        prompts that were computed side by side share their memory from then on.
        """
        if held.tail is None or self.prefix is None:
            return
        size = self.page_size
        for index in range(held.committed, computed // size):
            page = held.pages[index]
            ids = tuple(token_ids[index * size : (index + 1) * size])
            entry = self.prefix.insert(held.tail, ids, page)
            if entry is not None and entry.page != page:
                self.allocator.share(entry.page)
                held.pages[index] = entry.page
                held.synced = min(held.synced, index)
                self.allocator.release(page)
            held.tail = entry
            held.committed = index + 1
            if entry is None:
                return

    def forget(self, held: Iterable[HeldPages]) -> None:
        """Empty the prefix cache; pages already ``held`` will not be put into it either."""
        if self.prefix is not None:
            self.prefix.clear()
        for pages in held:
            pages.tail = None

    def give_back(self, held: HeldPages) -> None:
        """Release everything; the deepest pages are evicted first later on."""
        for page in reversed(held.pages):
            cached = self.prefix is not None and page in self.prefix
            self.allocator.release(page, keep=cached)
        held.pages, held.tail, held.committed, held.synced = [], None, 0, 0

    def discard(self, held: HeldPages) -> list[int]:
        """Release everything and forget its content, which may be bad.

        Returns: pages that nobody holds any more, to be cleared before anyone reads them.
        """
        dropped = []
        for page in reversed(held.pages):
            if self.allocator.references(page) == 1 and self.prefix is not None:
                self.prefix.remove(page)
            if self.allocator.release(page, keep=self.prefix is not None and page in self.prefix):
                dropped.append(page)
        held.pages, held.tail, held.committed, held.synced = [], None, 0, 0
        return dropped
