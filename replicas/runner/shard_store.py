"""One shard's pages as others reach them: other replicas over links, this replica's host memory by copies.

Knows no books: which pages, and when, the replica's exchange and its host tier say. Called by the thread that
runs the shard's steps, in the order of the books.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quire.kvstore.books.host_tier import Copies, HostPages
from quire.kvstore.peers.bandwidth import Bandwidth
from quire.kvstore.peers.messages import CompletePages, Moved, Order
from quire.kvstore.peers.mover import CHUNK_BYTES, PageMover, ShardPool
from quire.kvstore.wire.open_transport import open_transport
from quire.kvstore.wire.transport import Endpoint, LinkConfig, Transport
from quire.replicas.config import EngineConfig
from quire.replicas.errors import ConfigError
from quire.replicas.runner.shard import Shard


class ShardStore:
    """What a shard does for its replica besides steps."""

    slots: int
    """Of the host tier."""

    endpoint: Endpoint | None
    """Where other replicas' shards meet this one; None without links."""

    def __init__(
        self, shard: Shard, config: EngineConfig, rank: int, *, host: str, links: LinkConfig | None
    ) -> None:
        """`host`: the address at which the links listen; without links nothing does. Raises ConfigError."""
        self._device = shard.device
        self.slots = config.pool.host_bytes // shard.layout.page_bytes
        self._host_pages = _host_pages(config, shard, self.slots)
        self._transport: Transport | None = None
        self._mover: PageMover | None = None
        self.endpoint = None
        if links is not None:
            self._transport = open_transport(host, shard.device, links)
            pool = ShardPool(shard.pool, shard.layout, rank, config.tp, shard.kv_heads)
            most_s = config.store.max_send_bytes_s
            limit = Bandwidth(most_s, CHUNK_BYTES[shard.device.type]) if most_s else None
            self._mover = PageMover(pool, self._transport, limit=limit)
            self.endpoint = self._transport.endpoint

    def execute(self, order: Order, report: Callable[[Moved], None]) -> None:
        """Begin this shard's part; `report` is called by the order's deadline, mostly from other threads."""
        assert self._mover is not None, "an order without links to carry it out"
        if self._device.type == "cuda":
            # Links run beside the steps, on streams of their own that wait for no one. A step still under
            # way may write to pages that have changed hands since, or write what is to be sent; so may
            # copies of the host tier. The steps that come after a report need no such wait: it comes when
            # the link's stream is done.
            torch.cuda.current_stream(self._device).synchronize()
        self._mover.execute(order, report)

    def demote(self, copies: Copies) -> None:
        """Pool to host; on CUDA in the order of the steps' stream, as this is the thread that runs them."""
        assert self._host_pages is not None, "a copy to a host tier without slots"
        self._host_pages.demote(copies)

    def promote(self, copies: Copies) -> None:
        """Host to pool, likewise."""
        assert self._host_pages is not None, "a copy from a host tier without slots"
        self._host_pages.promote(copies)

    @property
    def precomputes_checksums(self) -> bool:
        """The same on all shards."""
        return self._mover is not None and self._mover.precomputes_checksums

    def precompute_checksums(self, complete: CompletePages) -> None:
        """Begin the checksums of pages, for other replicas."""
        assert self._mover is not None, "checksums without links"
        self._mover.precompute_checksums(complete)

    def close(self) -> None:
        """End all transfers, listen no more, and let go of the pages. May be called twice."""
        if self._transport is not None:
            self._transport.close()
        self._transport = self._mover = None  # whose last user closes the socket
        self._host_pages = None


def _host_pages(config: EngineConfig, shard: Shard, slots: int) -> HostPages | None:
    host_bytes = config.pool.host_bytes
    if host_bytes == 0:
        return None
    if slots == 0:
        raise ConfigError(
            f"pool.host_bytes is {host_bytes}, but a page has {shard.layout.page_bytes}; raise it, or set it "
            "to 0 for no host tier"
        )
    try:
        return HostPages(shard.pool, slots)
    except RuntimeError as error:  # what torch raises where there is no such memory
        raise ConfigError(
            f"pool.host_bytes is {host_bytes}, which this machine does not give: lower it"
        ) from error
