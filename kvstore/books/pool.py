"""Which KV pages are free, and which references hold the rest.

A page is free, used (referenced by a sequence, or leased to a peer that reads it) or cached (it holds a
complete block that is not in use, until it is evicted). Knows nothing of requests, tensors or devices; the
bytes are in each shard's pool tensor under the same page ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NewType

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.prefix_index import PageId, PrefixIndex

LeaseId = NewType("LeaseId", int)


@dataclass(frozen=True, slots=True)
class Lease:
    """Pages that keep their blocks until the lease ends."""

    id: LeaseId
    pages: tuple[PageId, ...]  # in the order of their keys
    generations: tuple[int, ...]
    until_s: float


class PoolFull(Exception):
    """More pages were requested than are free or cached; callers check `available` first."""

    def __init__(self, need: int, available: int, total: int) -> None:
        super().__init__(
            f"{need} KV pages are needed, {available} of {total} are available. "
            "Shorten the prompt, lower max_tokens, or raise pool.bytes."
        )


class IntegrityError(Exception):
    """The pool's records are inconsistent. The message lists every contradiction."""


class PagePool:
    """Allocates, shares and releases the pages of one replica."""

    def __init__(
        self, num_pages: int, evicted: Callable[[Sequence[tuple[BlockKey, PageId]]], None] | None = None
    ) -> None:
        """Call `evicted` with blocks that are evicted, before their pages are allocated again."""
        if num_pages < 1:
            raise ValueError(f"a pool has at least one page, got {num_pages}")
        self._evicted = evicted
        self._references = [0] * num_pages
        self._generations = [0] * num_pages
        self._leases: dict[LeaseId, Lease] = {}
        self._leases_given = 0
        self._free = [PageId(page) for page in reversed(range(num_pages))]
        self._index = PrefixIndex()

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return self._index.idle_pages

    @property
    def used(self) -> int:
        return self.total - self.free - self.cached

    @property
    def leased(self) -> int:
        """Count leased pages; one under several leases counts as often."""
        return sum(len(lease.pages) for lease in self._leases.values())

    @property
    def available(self) -> int:
        """Count the pages that `allocate` can return: free ones, then cached ones."""
        return self.free + self.cached

    def allocate(self, count: int) -> list[PageId]:
        """Allocate `count` pages with one reference each, evicting blocks if needed. Raises PoolFull."""
        if count > self.available:
            raise PoolFull(count, self.available, self.total)
        evicted = self._index.evict(count - self.free)
        if evicted and self._evicted is not None:
            self._evicted(evicted)
        self._free += [page for _, page in evicted]
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
            self._generations[page] += 1
        return pages

    def lookup(self, keys: Sequence[BlockKey]) -> tuple[int, int]:
        """Count the leading blocks of `keys` that are here, and those of them that are merely cached."""
        pages = self._index.match(keys)
        return len(pages), sum(map(self._index.is_idle, pages))

    def share(self, keys: Sequence[BlockKey]) -> list[PageId]:
        """Add a reference to each page of the leading blocks of `keys` that are here, and return them."""
        pages = self._index.match(keys)
        for page in pages:
            self._references[page] += 1
            self._index.busy(page)
        return pages

    def publish(self, key: BlockKey, page: PageId) -> None:
        """Make the complete block in `page` available to others."""
        if self._references[page] < 1:
            raise IntegrityError(f"page {page} was published without being held")
        self._index.insert(key, page)

    def withdraw(self, pages: Iterable[PageId]) -> None:
        """Withdraw the blocks in these held pages, which may be damaged: they are not found any more."""
        for page in pages:
            self._index.forget(page)
            self._generations[page] += 1

    def release(self, pages: Iterable[PageId]) -> None:
        """Drop one reference to each page; pages in token order.

        The last block of a chain is evicted first: a prefix is worth more than its tail.
        """
        for page in reversed(list(pages)):
            if self._references[page] < 1:
                raise IntegrityError(f"page {page} was released more often than it was held")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._index:
                    self._index.idle(page)
                else:
                    self._free.append(page)

    def generation(self, page: PageId) -> int:
        """Return a number that changes whenever the page may get other contents."""
        return self._generations[page]

    def lease(self, keys: Sequence[BlockKey], until_s: float) -> Lease:
        """Pin the leading blocks of `keys` that are here (perhaps none) for a peer that reads them."""
        pages = tuple(self.share(keys))
        self._leases_given += 1
        lease = Lease(LeaseId(self._leases_given), pages, tuple(map(self.generation, pages)), until_s)
        self._leases[lease.id] = lease
        return lease

    def end_lease(self, lease_id: LeaseId) -> bool:
        """Unpin. Returns False if what was read may be wrong: the lease was over, or a block withdrawn."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return False
        self.release(lease.pages)
        return lease.generations == tuple(map(self.generation, lease.pages))

    def expire_leases(self, now_s: float) -> list[LeaseId]:
        """End the leases whose deadline has passed, because their peer is gone or too slow."""
        over = [lease.id for lease in self._leases.values() if lease.until_s < now_s]
        for lease_id in over:
            self.end_lease(lease_id)
        return over

    def check(self, held: Iterable[PageId] = ()) -> None:
        """Compare the pool with `held`, all references of its callers but leases. Raises IntegrityError."""
        expected = [0] * self.total
        for page in held:
            expected[page] += 1
        for lease in self._leases.values():
            for page in lease.pages:
                expected[page] += 1
        faults = [
            f"page {page} has {count} references, {want} are held"
            for page, (count, want) in enumerate(zip(self._references, expected, strict=True))
            if count != want
        ]
        free = set(self._free)
        if len(free) != len(self._free):
            faults.append("a page is free twice")
        faults += [
            f"page {page} of lease {lease.id} was handed out again"
            for lease in self._leases.values()
            for page, generation in zip(lease.pages, lease.generations, strict=True)
            if generation != self._generations[page] and page in self._index
        ]
        faults += [f"page {page} is free and referred to" for page in free if self._references[page]]
        faults += [f"page {page} is free and holds a block" for page in free if page in self._index]
        unused = [PageId(page) for page, count in enumerate(self._references) if count == 0]
        faults += [f"page {page} is lost" for page in unused if page not in free and page not in self._index]
        faults += self._index.faults(unused)
        if faults:
            raise IntegrityError("; ".join(faults))
