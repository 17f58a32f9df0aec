"""The way from one replica to the others of its deployment and to the directory, as the engine sees it.

Knows no gRPC (`replicas/engine/peer_network.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.directory import Holder
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message, Moved, Order


class PeerNetwork(Protocol):
    """Reaches other replicas and the directory. No call waits for either."""

    def send(self, to: ReplicaId, message: Message, failed: Callable[[], None]) -> None:
        """Carry a message to a replica; `failed` is called, from some thread, if it did not arrive."""

    def lookup(self, chain: Sequence[BlockKey], answer: Callable[[tuple[Holder, ...]], None]) -> None:
        """Ask who holds the leading blocks of a chain; `answer` is called from some thread, if at all."""

    def added(self, keys: Sequence[BlockKey]) -> None:
        """Announce that this replica holds these blocks now."""

    def removed(self, keys: Sequence[BlockKey]) -> None:
        """Announce that this replica does not hold these blocks any more."""


class NoPeers:
    """The network and the shards of a replica that shares no blocks: nothing is found, nothing arrives."""

    def send(self, to: ReplicaId, message: Message, failed: Callable[[], None]) -> None:
        failed()

    def lookup(self, chain: Sequence[BlockKey], answer: Callable[[tuple[Holder, ...]], None]) -> None:
        answer(())

    def added(self, keys: Sequence[BlockKey]) -> None: ...
    def removed(self, keys: Sequence[BlockKey]) -> None: ...
    def execute(self, order: Order, report: Callable[[Moved], None]) -> None: ...
