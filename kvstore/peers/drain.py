"""What a replica that is scaled in offers to those that stay.

    replica that goes                                   receiver
      DrainOffer: its chains used last, the hottest first ──→  fetches them, into free pages only
      all receivers have answered: it may go          ←──  DrainAck: has what it wants of them

Both sides, without I/O; `Peer` carries messages and fetches. A replica that goes takes nothing from others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import DrainOffer

_HOT_CHAINS = 256
"""Remembered, to be handed over."""


class Drain:
    """One replica's part in drains, on either side. Owned by one thread, but for `begin` and `open`."""

    def __init__(self, space: bytes) -> None:
        """`space`: `KeySpace.fingerprint`; chains of another are of no use here."""
        self._space = space
        self._chains: OrderedDict[BlockKey, tuple[BlockKey, ...]] = OrderedDict()
        """Of prompts, by their last block; the one used last at the end."""
        self._receivers: set[ReplicaId] | None = None
        """Those that have yet to answer; None while this replica stays."""
        self.pending_chains: deque[tuple[ReplicaId, tuple[BlockKey, ...]]] = deque(maxlen=4 * _HOT_CHAINS)
        """Chains that were offered to this replica, still to be fetched."""
        self._offering: set[ReplicaId] = set()
        """Replicas that wait for an answer of this one."""

    def used(self, chain: tuple[BlockKey, ...]) -> None:
        """A prompt has these full blocks."""
        if chain:
            self._chains[chain[-1]] = chain
            self._chains.move_to_end(chain[-1])
            if len(self._chains) > _HOT_CHAINS:
                self._chains.popitem(last=False)

    # ---- the replica that goes

    def begin(self, receivers: Sequence[ReplicaId]) -> None:
        """The drain is `open` from now on, until all receivers have answered or are gone."""
        self._receivers = set(receivers)

    @property
    def open(self) -> bool:
        """Whether a receiver may still want something."""
        return bool(self._receivers)

    def offers(self, receivers: Sequence[ReplicaId]) -> list[tuple[ReplicaId, DrainOffer]]:
        """An offer for each receiver; every chain is offered to one of them."""
        hot = list(reversed(self._chains.values()))
        shares = [DrainOffer(self._space, tuple(hot[at :: len(receivers)])) for at in range(len(receivers))]
        return list(zip(receivers, shares, strict=True))

    def answered(self, receiver: ReplicaId) -> None:
        """This receiver has what it wants, or is gone."""
        if self._receivers:
            self._receivers.discard(receiver)

    # ---- a receiver

    def offered(self, owner: ReplicaId, offer: DrainOffer) -> None:
        """Its chains become `pending_chains` if they are of use."""
        self._offering.add(owner)
        if offer.space == self._space and self._receivers is None:
            self.pending_chains.extend((owner, chain) for chain in offer.chains)

    def satisfied(self, fetches_from: Callable[[ReplicaId], bool]) -> set[ReplicaId]:
        """Replicas that go and of which nothing is wanted any more; each is returned once."""
        wanted = {owner for owner, _ in self.pending_chains}
        done = {owner for owner in self._offering - wanted if not fetches_from(owner)}
        self._offering -= done
        return done
