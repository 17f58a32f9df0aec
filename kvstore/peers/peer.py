"""One replica among its peers: brings messages and reports to its exchange, and carries out what follows.

One thread owns it, together with the pool: the engine's. Other threads only put into its inbox.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.pool import PagePool
from quire.kvstore.peers.drain import Drain
from quire.kvstore.peers.exchange import Exchange, FetchDone, RunOrder, SendMessage
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import DrainAck, DrainOffer, Message, Moved, Order
from quire.kvstore.wire.failures import TransferFailed

SendTo = Callable[[ReplicaId, Message, Callable[[], None]], None]
"""Carries a message to a replica without waiting; calls its last argument, in any thread, if that failed."""


class Shards(Protocol):
    """The shards of a replica, which carry out the orders of transfers."""

    def execute(self, order: Order, report: Callable[[Moved], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Received:
    sender: ReplicaId
    message: Message


@dataclass(frozen=True, slots=True)
class _Gone:
    peer: ReplicaId


@dataclass(frozen=True, slots=True)
class _Leave:
    receivers: tuple[ReplicaId, ...]


class Peer:
    """One replica's part in all transfers and drains."""

    def __init__(
        self,
        pool: PagePool,
        exchange: Exchange,
        shards: Shards,
        send: SendTo,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`wake` is called by other threads after they have put something into the inbox."""
        self._pool, self.exchange, self._shards = pool, exchange, shards
        self._send_to, self._wake = send, wake
        self._inbox: deque[_Received | _Gone | _Leave | Moved] = deque()
        self._drain = Drain(exchange.space)

    @property
    def has_news(self) -> bool:
        """Whether `poll` has something to take in."""
        return bool(self._inbox)

    @property
    def is_draining(self) -> bool:
        """Whether another replica may still want blocks of this one, or is reading pages here."""
        return self._drain.open or bool(self.exchange.loans)

    # ---- from any thread

    def on_message(self, sender: ReplicaId, message: Message) -> None:
        """Another replica has sent this message."""
        self._put(_Received(sender, message))

    def on_peer_gone(self, peer: ReplicaId) -> None:
        """Another replica is dead or cannot be reached."""
        self._put(_Gone(peer))

    def drain(self, receivers: Sequence[ReplicaId]) -> None:
        """Offer the chains that were used last to these replicas."""
        self._drain.begin(receivers)
        self._put(_Leave(tuple(receivers)))

    def _put(self, news: _Received | _Gone | _Leave | Moved) -> None:
        self._inbox.append(news)
        self._wake()

    # ---- from the owner's thread

    def used(self, chain: tuple[BlockKey, ...]) -> None:
        """A prompt has these full blocks: they are offered when this replica is drained."""
        self._drain.used(chain)

    def poll(self, now_s: float) -> list[FetchDone]:
        """Take in what has come, give up what is late, carry out what follows; the fetches that are over."""
        while self._inbox:
            match self._inbox.popleft():
                case _Received(sender, DrainOffer() as offer):
                    self._drain.offered(sender, offer)
                case _Received(sender, DrainAck()):
                    self._drain.answered(sender)
                case _Received(sender, message):
                    self.exchange.handle(sender, message, now_s)
                case _Gone(peer):
                    self.exchange.peer_gone(peer, now_s)
                    self._drain.answered(peer)
                case _Leave(receivers):
                    for receiver, offer in self._drain.offers(receivers):
                        self._send(receiver, offer)
                case Moved() as report:
                    self.exchange.moved(report, now_s)
        self.exchange.expire(now_s)
        done: list[FetchDone] = []
        self._fetch_offered(now_s)
        while effects := self.exchange.take():
            for effect in effects:
                match effect:
                    case SendMessage(to, message):
                        self._send(to, message)
                    case RunOrder(order):
                        self._shards.execute(order, self._put)
                    case FetchDone():
                        done.append(effect)
            self._fetch_offered(now_s)
        return done

    def _send(self, to: ReplicaId, message: Message) -> None:
        self._send_to(to, message, partial(self.on_peer_gone, to))

    def _fetch_offered(self, now_s: float) -> None:
        """Fetch what others drain, into free pages only: none of the blocks here makes room for it."""
        pending = self._drain.pending_chains
        while pending:
            owner, chain = pending[0]
            wanted = chain[self._pool.lookup(chain)[0] :][: self._pool.free]
            if wanted and self.exchange.fetching(wanted[0]) is None:
                try:
                    self.exchange.fetch(owner, wanted, now_s)
                except TransferFailed:
                    break  # as many as may be are under way: later
            pending.popleft()
        for peer in self._drain.satisfied(self.exchange.fetches_from):
            self._send(peer, DrainAck())
