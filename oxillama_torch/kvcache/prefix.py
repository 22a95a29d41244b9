"""Prefix cache: full KV pages found again by the tokens that led to them.

Every full page is an entry in a hash chain,

    digest(page) = SHA-256(digest(parent page) || token ids of the page as int64)

whose root is the digest of everything else that shapes keys and values: model, adapters, tenant.
A digest only finds a candidate. It is taken when its parent *is* the entry matched before it and
its token ids are equal, so that a colliding hash costs a miss and never hands out a wrong page.

The idea of a chain of page hashes is vLLM's automatic prefix caching
(https://docs.vllm.ai/en/latest/design/prefix_caching.html).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from oxillama_torch.kvcache.pages import PageAllocator

__all__ = ["CachedPage", "PrefixCache", "PrefixRoot"]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@dataclass(frozen=True, slots=True)
class PrefixRoot:
    """Start of a chain: what besides the tokens decides the content of a page."""

    identity: Hashable
    digest: bytes


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A full page that can be found again. ``identity`` is never reused.

    ``parent`` is the identity of the page before it, or of the root.
    """

    identity: Hashable
    parent: Hashable
    digest: bytes
    token_ids: tuple[int, ...]
    page: int


class PrefixCache:
    """Finds, records and forgets full pages of an allocator.

    Args:
        allocator: owns the pages; evictions are reported back to this cache.
        page_size: tokens per page.
        model: identifies the model and everything that changes its keys and values.
        hash: bytes to digest; tests pass one that collides.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        page_size: int,
        model: str,
        hash: Callable[[bytes], bytes] = _sha256,
    ) -> None:
        self._allocator, self._page_size, self._model, self._hash = (
            allocator,
            page_size,
            model,
            hash,
        )
        self._by_digest: dict[bytes, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._identities = itertools.count()
        allocator.on_evict = self.remove

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def __len__(self) -> int:
        return len(self._by_page)

    def root(self, adapters: tuple[tuple[str, float], ...], salt: str) -> PrefixRoot:
        """Start of the chain for a set of adapters and a tenant's salt."""
        text = json.dumps([self._model, adapters, salt])
        return PrefixRoot(text, self._hash(text.encode()))

    def match(self, root: PrefixRoot, token_ids: Sequence[int], limit: int) -> list[CachedPage]:
        """Longest run of cached pages that starts ``token_ids``, at most ``limit`` tokens long."""
        found: list[CachedPage] = []
        parent: PrefixRoot | CachedPage = root
        for start in range(0, limit - self._page_size + 1, self._page_size):
            ids = tuple(token_ids[start : start + self._page_size])
            entry = self._by_digest.get(self._digest(parent, ids))
            if entry is None or entry.parent != parent.identity or entry.token_ids != ids:
                break
            found.append(entry)
            parent = entry
        return found

    def insert(
        self, parent: PrefixRoot | CachedPage, token_ids: tuple[int, ...], page: int
    ) -> CachedPage | None:
        """Record a page that has just become full.

        Returns: its entry; the entry of another page that holds the same tokens already; None when
            the digest collides with that of other tokens (the page cannot be cached).
        """
        assert len(token_ids) == self._page_size, "only full pages are cached"
        digest = self._digest(parent, token_ids)
        entry = self._by_digest.get(digest)
        if entry is not None:
            same = entry.parent == parent.identity and entry.token_ids == token_ids
            return entry if same else None
        entry = CachedPage(next(self._identities), parent.identity, digest, token_ids, page)
        self._by_digest[digest] = entry
        self._by_page[page] = entry
        return entry

    def remove(self, page: int) -> None:
        """Forget a page's content; harmless for a page that is not recorded."""
        entry = self._by_page.pop(page, None)
        if entry is not None:
            del self._by_digest[entry.digest]

    def clear(self) -> None:
        """Forget everything; pages that nobody holds become free."""
        for page in list(self._by_page):
            self.remove(page)
            self._allocator.forget(page)

    def _digest(self, parent: PrefixRoot | CachedPage, token_ids: tuple[int, ...]) -> bytes:
        return self._hash(parent.digest + array("q", token_ids).tobytes())
