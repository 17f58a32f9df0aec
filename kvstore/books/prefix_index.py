"""Which complete blocks lie in which pages, and which of them would go first.

Knows keys and page ids; who uses a page is `pool.py`'s to say, through `idle` and `busy`.
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
        """Pages that hold a block nobody uses."""
        return len(self._idle)

    def is_idle(self, page: PageId) -> bool:
        return page in self._idle

    def match(self, keys: Sequence[BlockKey]) -> list[PageId]:
        """Pages of the longest leading run of `keys` that is here."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: BlockKey, page: PageId) -> bool:
        """Name the block in `page`. False if another page already holds it: the first one stays."""
        if key in self._page_of:
            return self._page_of[key] == page
        if page in self._key_of:
            raise ValueError(f"page {page} already holds block {self._key_of[page].hex()[:12]}")
        self._page_of[key] = page
        self._key_of[page] = key
        return True

    def idle(self, page: PageId) -> None:
        """Nobody uses the block any more: it becomes the last to be evicted."""
        self._idle[page] = None

    def busy(self, page: PageId) -> None:
        """Somebody uses the block: it cannot be evicted."""
        self._idle.pop(page, None)

    def evict(self, count: int) -> list[tuple[BlockKey, PageId]]:
        """Forget the `count` least recently used unused blocks and hand over their pages."""
        evicted = []
        for _ in range(min(count, len(self._idle))):
            page, _ = self._idle.popitem(last=False)
            key = self._key_of.pop(page)
            del self._page_of[key]
            evicted.append((key, page))
        return evicted

    def forget(self, page: PageId) -> None:
        """The block in `page`, if any, must not be found again."""
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
            self._idle.pop(page, None)

    def faults(self, unused: Iterable[PageId]) -> list[str]:
        """What contradicts itself, given the pages that nobody uses; empty if all is well."""
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
