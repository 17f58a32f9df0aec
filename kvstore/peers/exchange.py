"""One replica's side of all transfers: who lends what to whom, and what becomes of the pages.

Messages and reports in, effects out (`take`); the time is passed in. No thread, no I/O: the engine's thread
owns it together with the pool.

    fetch        OFFERED ── Accept ─→ RECEIVING ── all shards ─→ CONFIRMING ── Released(held) ─→ published
                    └───────────┬─────────┴──────────────────────────┘ refusal, failure, deadline
                                ▼
                             ENDING ── all own shards have reported ─→ pages free

Whatever goes wrong, the engine is told once, at the deadline at the latest, and computes the blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.pool import Lease, LeaseId, PagePool
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import (
    Accept,
    Done,
    Message,
    Moved,
    Offer,
    Order,
    ReceivePages,
    Refuse,
    Released,
    SendPages,
)
from quire.kvstore.peers.slices import fits
from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.transport import Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig:
    """Bounds of one replica's transfers."""

    timeout_s: float = 5.0
    """A fetch that takes longer is given up."""
    max_lease_s: float = 30.0
    """No peer keeps pages pinned longer."""
    max_fetches: int = 8
    """Under way at once."""
    max_loans: int = 16
    """Under way at once."""
    max_lent_share: float = 0.5
    """The share of the pool's pages that may be pinned for peers, who need not come back for them."""


@dataclass(frozen=True, slots=True)
class SendMessage:
    """Carry a message to another replica. If that fails, call `peer_gone`."""

    to: ReplicaId
    message: Message


@dataclass(frozen=True, slots=True)
class RunOrder:
    """Have all own shards carry out an order; each reports with a `Moved`."""

    order: Order


@dataclass(frozen=True, slots=True)
class FetchDone:
    """A fetch is over: the leading `blocks` of its keys are in the pool now, cached."""

    transfer: TransferId
    owner: ReplicaId
    keys: tuple[BlockKey, ...]
    blocks: int
    seconds: float
    bytes_moved: int
    failure: Cause | None = None
    reason: str = ""


Effect = SendMessage | RunOrder | FetchDone


@dataclass(slots=True)
class TransferStats:
    """Counted since the start, for the metrics."""

    fetches: int = 0
    loans: int = 0
    blocks_fetched: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    bytes_saved: int = 0
    """What the received blocks would have been in bf16, less what they are."""
    seconds_fetching: float = 0.0
    """From offer to publication, summed over fetches."""
    fetch_failures: Counter[Cause] = field(default_factory=Counter)
    loan_failures: Counter[Cause] = field(default_factory=Counter)


class _State(StrEnum):
    OFFERED = "offered"
    RECEIVING = "receiving"
    CONFIRMING = "confirming"
    ENDING = "ending"


@dataclass(slots=True)
class _Fetch:
    transfer: TransferId
    owner: ReplicaId
    keys: tuple[BlockKey, ...]
    started_s: float
    deadline_s: float
    state: _State = _State.OFFERED
    pages: list[PageId] = field(default_factory=list)
    awaited: set[int] = field(default_factory=set)
    """Own shards that may still write into the pages."""
    bytes_moved: int = 0


class Exchange:
    """Fetches blocks from other replicas, and lends them its own."""

    def __init__(
        self,
        pool: PagePool,
        space: bytes,
        endpoints: Sequence[Endpoint],
        config: ExchangeConfig | None = None,
        *,
        kv_heads: int,
        bf16_ratio: float = 1.0,
    ) -> None:
        """`space`: `KeySpace.fingerprint`; nothing is lent to or taken from another one.

        `endpoints`: of the own shards, by rank. `bf16_ratio`: a block's bytes in bf16 by its bytes.
        """
        self.space = space
        self._kv_heads = kv_heads
        self.stats = TransferStats()
        self._pool, self._endpoints = pool, tuple(endpoints)
        self._config, self._bf16_ratio = config or ExchangeConfig(), bf16_ratio
        self._fetches: dict[TransferId, _Fetch] = {}
        self._loans: dict[tuple[ReplicaId, TransferId], Lease] = {}
        self._effects: list[Effect] = []
        self._started = 0

    def take(self) -> list[Effect]:
        """What is to be done now, in order; each effect is returned once."""
        effects, self._effects = self._effects, []
        return effects

    def held_pages(self) -> Iterator[PageId]:
        """For the pool's `check`."""
        for fetch in self._fetches.values():
            yield from fetch.pages

    def fetches_from(self, owner: ReplicaId) -> bool:
        """Whether a fetch from it is under way."""
        return any(fetch.owner == owner for fetch in self._fetches.values())

    def fetching(self, first: BlockKey) -> TransferId | None:
        """The fetch under way that begins with this block."""
        open_fetches = (fetch for fetch in self._fetches.values() if fetch.state is not _State.ENDING)
        return next((fetch.transfer for fetch in open_fetches if fetch.keys[0] == first), None)

    @property
    def loans(self) -> int:
        """Under way now."""
        return len(self._loans)

    @property
    def next_deadline_s(self) -> float | None:
        """When `expire` will have something to do."""
        times = [f.deadline_s for f in self._fetches.values() if f.state is not _State.ENDING]
        return min([*times, *(lease.until_s for lease in self._loans.values())], default=None)

    # ---- what the engine asks for

    def fetch(self, owner: ReplicaId, keys: Sequence[BlockKey], now_s: float) -> TransferId:
        """Ask `owner` for successive blocks; a `FetchDone` follows. Raises TransferFailed if too many are."""
        if len(self._fetches) >= self._config.max_fetches:
            raise TransferFailed(Cause.BUSY, f"{len(self._fetches)} fetches are under way")
        self._started += 1
        timeout_s = self._config.timeout_s
        fetch = _Fetch(TransferId(self._started), owner, tuple(keys), now_s, now_s + timeout_s)
        self._fetches[fetch.transfer] = fetch
        self.stats.fetches += 1
        self._send(owner, Offer(fetch.transfer, fetch.keys, self.space, self._endpoints, timeout_s))
        return fetch.transfer

    def expire(self, now_s: float) -> None:
        """Give up what takes too long."""
        for fetch in list(self._fetches.values()):
            if fetch.state is not _State.ENDING and now_s > fetch.deadline_s:
                self._fail(fetch, Cause.DEADLINE, f"not done within {self._config.timeout_s:g} s", now_s)
        over = set(self._pool.expire_leases(now_s))
        self._end_loans(over, Cause.LEASE)

    def peer_gone(self, peer: ReplicaId, now_s: float) -> None:
        """A replica is dead or cannot be reached: nothing more is expected of it."""
        for fetch in list(self._fetches.values()):
            if fetch.owner == peer and fetch.state is not _State.ENDING:
                self._fail(fetch, Cause.PEER, f"{peer} is gone", now_s, say_done=False)
        gone = {lease.id for (receiver, _), lease in self._loans.items() if receiver == peer}
        for lease_id in gone:
            self._pool.end_lease(lease_id)
        self._end_loans(gone, Cause.PEER)

    # ---- what others say

    def handle(self, sender: ReplicaId, message: Message, now_s: float) -> None:
        """A message of another replica. One that fits nothing is answered so that the sender can let go."""
        match message:
            case Offer():
                self._lend(sender, message, now_s)
            case Done():
                lease = self._loans.pop((sender, message.transfer), None)
                held = lease is not None and self._pool.end_lease(lease.id)
                self._send(sender, Released(message.transfer, held))
            case Accept() | Refuse() | Released():
                fetch = self._fetches.get(message.transfer)
                if fetch is not None and fetch.owner == sender:
                    self._advance(fetch, message, now_s)
                elif isinstance(message, Accept):
                    self._send(sender, Done(message.transfer))

    def moved(self, report: Moved, now_s: float) -> None:
        """The report of one of the own shards."""
        if not report.received:
            self.stats.bytes_sent += report.bytes_moved
            if report.failure is not None:
                self.stats.loan_failures[report.failure] += 1
            return
        fetch = self._fetches.get(report.transfer)
        if fetch is None or report.rank not in fetch.awaited:
            return
        fetch.awaited.discard(report.rank)
        fetch.bytes_moved += report.bytes_moved
        if fetch.state is _State.ENDING:
            self._clear(fetch)
        elif report.failure is not None:
            self._fail(fetch, report.failure, report.reason, now_s)
        elif not fetch.awaited:
            fetch.state = _State.CONFIRMING
            self._send(fetch.owner, Done(fetch.transfer))

    # ---- lending

    def _lend(self, receiver: ReplicaId, offer: Offer, now_s: float) -> None:
        refusal: tuple[Cause, str] | None = None
        lease_s = min(offer.timeout_s, self._config.max_lease_s)
        room = int(self._pool.total * self._config.max_lent_share) - self._pool.leased
        busy = len(self._loans) >= self._config.max_loans or (receiver, offer.transfer) in self._loans
        if offer.space != self.space:
            refusal = Cause.REFUSED, "another model, or another KV format, is served here"
        elif not fits(len(offer.endpoints), self._kv_heads):
            refusal = Cause.REFUSED, "the pages cannot be cut for that number of shards"
        elif busy or room < 1:
            refusal = Cause.BUSY, f"{len(self._loans)} loans of {self._pool.leased} pages are under way"
        else:
            lease = self._pool.lease(offer.keys[:room], now_s + lease_s)
            if not lease.pages:
                self._pool.end_lease(lease.id)
                refusal = Cause.REFUSED, "none of the blocks is here"
        if refusal is not None:
            self._send(receiver, Refuse(offer.transfer, *refusal))
            return
        self._loans[receiver, offer.transfer] = lease
        self.stats.loans += 1
        self._send(receiver, Accept(offer.transfer, lease.generations, self._endpoints, lease_s))
        self._effects.append(
            RunOrder(
                SendPages(
                    receiver=receiver,
                    transfer=offer.transfer,
                    keys=offer.keys[: len(lease.pages)],
                    pages=lease.pages,
                    generations=lease.generations,
                    peers=offer.endpoints,
                    timeout_s=lease_s,
                )
            )
        )

    def _end_loans(self, over: set[LeaseId], cause: Cause) -> None:
        for key, lease in list(self._loans.items()):
            if lease.id in over:
                del self._loans[key]
                self.stats.loan_failures[cause] += 1

    # ---- fetching

    def _advance(self, fetch: _Fetch, message: Accept | Refuse | Released, now_s: float) -> None:
        match message:
            case Accept() if fetch.state is _State.OFFERED:
                self._accepted(fetch, message, now_s)
            case Refuse() if fetch.state is _State.OFFERED:
                self._fail(fetch, message.cause, message.reason, now_s, say_done=False)
            case Released() if fetch.state is _State.CONFIRMING:
                if message.held:
                    self._publish(fetch, now_s)
                else:
                    self._fail(fetch, Cause.LEASE, "the owner's lease was over", now_s, say_done=False)

    def _accepted(self, fetch: _Fetch, accept: Accept, now_s: float) -> None:
        blocks = len(accept.generations)
        if not 0 < blocks <= len(fetch.keys) or not fits(len(accept.endpoints), self._kv_heads):
            self._fail(fetch, Cause.HEADER, f"{blocks} of {len(fetch.keys)} blocks were accepted", now_s)
        elif blocks > self._pool.available:
            self._fail(fetch, Cause.NO_PAGES, f"{self._pool.available} pages for {blocks} blocks", now_s)
        else:
            fetch.state = _State.RECEIVING
            fetch.pages = self._pool.allocate(blocks)
            fetch.awaited = set(range(len(self._endpoints)))
            self._effects.append(
                RunOrder(
                    ReceivePages(
                        transfer=fetch.transfer,
                        keys=fetch.keys[:blocks],
                        pages=tuple(fetch.pages),
                        generations=accept.generations,
                        peers=accept.endpoints,
                        timeout_s=max(fetch.deadline_s - now_s, 0.0),
                    )
                )
            )

    def _publish(self, fetch: _Fetch, now_s: float) -> None:
        for key, page in zip(fetch.keys, fetch.pages, strict=False):
            self._pool.publish(key, page)
        self.stats.blocks_fetched += len(fetch.pages)
        self.stats.bytes_received += fetch.bytes_moved
        self.stats.bytes_saved += int(fetch.bytes_moved * (self._bf16_ratio - 1))
        self._report(fetch, len(fetch.pages), now_s)
        self._clear(fetch)

    def _fail(self, fetch: _Fetch, cause: Cause, reason: str, now_s: float, *, say_done: bool = True) -> None:
        """The engine is told now; the pages come back when no shard can write into them any more."""
        fetch.state = _State.ENDING
        self.stats.fetch_failures[cause] += 1
        if say_done:
            self._send(fetch.owner, Done(fetch.transfer))
        self._report(fetch, 0, now_s, cause, reason)
        self._clear(fetch)

    def _clear(self, fetch: _Fetch) -> None:
        if not fetch.awaited:
            self._pool.release(fetch.pages)
            del self._fetches[fetch.transfer]

    def _report(
        self, fetch: _Fetch, blocks: int, now_s: float, failure: Cause | None = None, reason: str = ""
    ) -> None:
        seconds = now_s - fetch.started_s
        self.stats.seconds_fetching += seconds
        self._effects.append(
            FetchDone(
                transfer=fetch.transfer,
                owner=fetch.owner,
                keys=fetch.keys,
                blocks=blocks,
                seconds=seconds,
                bytes_moved=fetch.bytes_moved if blocks else 0,
                failure=failure,
                reason=reason,
            )
        )

    def _send(self, to: ReplicaId, message: Message) -> None:
        self._effects.append(SendMessage(to, message))
