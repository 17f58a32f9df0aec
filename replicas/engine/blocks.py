"""Every place where a replica finds blocks: its pool, its host memory, its peers.

Owned by the engine and used on its thread. Which sequence gets which page stays the engine's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any, Protocol

from quire.kvstore.books.host_tier import Copies, HostTier
from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.pool import PagePool
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.messages import CompletePages
from quire.replicas.engine.prefix_waits import PrefixWaits
from quire.replicas.engine.sequence import Sequence


class Copier(Protocol):
    """Copies and sums pages on all shards, in its place among the steps."""

    @property
    def num_pages(self) -> int: ...

    @property
    def host_slots(self) -> int:
        """Blocks that every shard's host memory takes."""

    def demote(self, copies: Copies) -> None:
        """Copy pages to host memory."""

    def promote(self, copies: Copies) -> None:
        """Copy pages from host memory."""

    def precompute_checksums(self, complete: CompletePages) -> None:
        """Have the checksums of these pages ready for peers."""


class BlockStore:
    """The pool, with what is behind it."""

    def __init__(self, copier: Copier, share: Callable[[PagePool], PrefixWaits] | None) -> None:
        self.pool = PagePool(copier.num_pages, self._make_room)
        self.host = HostTier(copier.host_slots)
        self.waits = (share or PrefixWaits.without_peers)(self.pool)
        self._copier = copier

    def expect(self, seq: Sequence, now_s: float) -> None:
        """A sequence has come: blocks that are neither in the pool nor in host memory may be fetched."""
        keys = seq.shareable_keys()
        here, _ = self.pool.lookup(keys)
        seq.found_blocks = here + self.host.match(keys[here:])
        self.waits.expect(seq, seq.found_blocks, now_s)

    def find(self, seq: Sequence) -> tuple[int, int]:
        """Leading blocks of the sequence that are in the pool now, and how many of them are unused."""
        keys = seq.shareable_keys()
        if not seq.brought_back:
            seq.promoted_blocks = self._bring_back(keys)
            seq.brought_back = True
        found = self.pool.lookup(keys)
        seq.found_blocks = found[0]
        return found

    def publish(self, blocks: Seq[tuple[BlockKey, PageId]]) -> None:
        """These blocks are complete: sequences and peers may have them."""
        for key, page in blocks:
            self.pool.publish(key, page)
        pages = tuple(page for _, page in blocks)
        self._copier.precompute_checksums(CompletePages(pages, tuple(map(self.pool.generation, pages))))
        if blocks:
            self.waits.network.added([key for key, _ in blocks])

    def withdraw(self, seq: Sequence, pages: Iterable[PageId]) -> None:
        """A sequence's blocks may be damaged: no other may find them, nor those it has given back."""
        keys = seq.keys()
        found = self.pool.share(keys)
        self.pool.withdraw({*pages, *found})
        self.pool.release(found)
        self.host.forget(keys)
        self.waits.network.removed(keys)

    def numbers(self) -> dict[str, Any]:
        """Its part of `EngineStats`."""
        pool, host, moved = self.pool, self.host, self.waits.peer.exchange.stats
        return {
            "pages_free": pool.free,
            "pages_cached": pool.cached,
            "pages_used": pool.used,
            "host_blocks": host.used,
            "host_free": host.slots - host.used,
            "demoted_blocks": host.stats.demoted,
            "promoted_blocks": host.stats.promoted,
            "dropped_blocks": host.stats.dropped,
            "fetch_choices": self.waits.choices,
            "fetches": moved.fetches,
            "fetch_seconds": moved.seconds_fetching,
            "fetched_blocks": moved.blocks_fetched,
            "fetch_failures": {cause.value: count for cause, count in moved.fetch_failures.items()},
            "loans": moved.loans,
            "loan_failures": {cause.value: count for cause, count in moved.loan_failures.items()},
            "bytes_received": moved.bytes_received,
            "bytes_sent": moved.bytes_sent,
            "bytes_saved": moved.bytes_saved,
        }

    def check(self, held: Iterable[PageId]) -> None:
        """Hold the books against the pages that sequences hold. Raises IntegrityError."""
        self.pool.check([*held, *self.waits.peer.exchange.held_pages()])
        self.host.check()

    def _make_room(self, blocks: Seq[tuple[BlockKey, PageId]]) -> None:
        """Blocks leave the pool: their bytes stay in host memory, if there is any for them."""
        self._copier.demote(self.host.demote(blocks))
        self.waits.network.removed([key for key, _ in blocks])

    def _bring_back(self, keys: Seq[BlockKey]) -> int:
        """Blocks that host memory holds, into the pool, where they are found like all others. How many."""
        held = self.pool.share(keys)  # or they might make room for what follows them
        missing = keys[len(held) :]
        pages = self.pool.allocate(min(self.host.match(missing), self.pool.available))
        # What made room for them may have taken the slots of some: the host tier was full as well.
        blocks = list(zip(missing[: self.host.match(missing)], pages, strict=False))
        if blocks:
            self._copier.promote(self.host.promote([key for key, _ in blocks], pages[: len(blocks)]))
            self.publish(blocks)
        self.pool.release(held + pages)
        return len(blocks)
