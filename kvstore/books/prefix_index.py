"""Which pages hold which complete blocks, and in which order those are evicted.

Knows keys and page ids; `pool.py` says which pages are in use, through `idle` and `busy`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NewType

from quire.kvstore.books.keys import BlockKey

PageId = NewType("PageId", int)


class PrefixIndex:
    """BlockKey to page, with the unused pages in order of eviction (least recently used first)."""

    def __init__(self) -> None:
        self._page_of: dict[BlockKey, PageId] = {}
        self._key_of: dict[PageId, BlockKey] = {}
        self._idle: OrderedDict[PageId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, page: PageId) -> bool:
        return page in self._key_of

    @property
    def idle_pages(self) -> int:
        """Count pages that hold an unused block."""
        return len(self._idle)

    def is_idle(self, page: PageId) -> bool:
        return page in self._idle

    def match(self, keys: Sequence[BlockKey]) -> list[PageId]:
        """Return the pages of the longest leading run of `keys` that is here."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: BlockKey, page: PageId) -> bool:
        """Name the block in `page`. Returns False if another page holds it already; that one is kept."""
        if key in self._page_of:
            return self._page_of[key] == page
        if page in self._key_of:
            raise ValueError(f"page {page} already holds block {self._key_of[page].hex()[:12]}")
        self._page_of[key] = page
        self._key_of[page] = key
        return True

    def idle(self, page: PageId) -> None:
        """Mark the block as unused: it becomes the last to be evicted."""
        self._idle[page] = None

    def busy(self, page: PageId) -> None:
        """Mark the block as in use: it cannot be evicted."""
        self._idle.pop(page, None)

    def evict(self, count: int) -> list[tuple[BlockKey, PageId]]:
        """Remove the `count` least recently used unused blocks, and return their pages."""
        evicted = []
        for _ in range(min(count, len(self._idle))):
            page, _ = self._idle.popitem(last=False)
            key = self._key_of.pop(page)
            del self._page_of[key]
            evicted.append((key, page))
        return evicted

    def forget(self, page: PageId) -> None:
        """Remove the block in `page`, if any."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
            self._idle.pop(page, None)

    def faults(self, unused: Iterable[PageId]) -> list[str]:
        """List contradictions, given the unused pages."""
        found = [
            f"block {key.hex()[:12]} points to page {page}, which holds another"
            for key, page in self._page_of.items()
            if self._key_of.get(page) != key
        ]
        if len(self._page_of) != len(self._key_of):
            found.append(f"{len(self._page_of)} blocks are named, {len(self._key_of)} pages hold one")
        wrong = set(self._idle) ^ {page for page in unused if page in self._key_of}
        found += [f"page {page} is wrongly counted as in use or as evictable" for page in sorted(wrong)]
        return found
