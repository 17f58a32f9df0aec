"""What the engine does with its neighbours' blocks: looks them up, weighs fetching against computing, lends.

Runs on the engine's thread, as the pool does whose pages it fills. Other threads only put into its inbox.

    a prompt with blocks that are not here
      LOOKED UP  ── holders ─→ decide ── fetch ─→ FETCHING ── blocks are in the pool ─→ admitted, shared
          └── no answer in time, nobody holds them, or computing is sooner ──→ admitted, computed

While a sequence is looked up or fetched for, it waits and holds nobody up. Whatever fails ends in computing.
Where a request says who has just computed its prompt, that replica is asked at once.

What a replica that leaves hands over is in `hand_over.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from quire.kvstore.cost import Choice, CostModel, Decision
from quire.kvstore.directory import Holder
from quire.kvstore.exchange import Exchange, Fetched, Say, Tell, TransferStats
from quire.kvstore.failures import Cause, TransferFailed
from quire.kvstore.keys import BlockKey
from quire.kvstore.messages import Leaving, Message, Moved, Order, ReplicaId, Taken, TransferId
from quire.kvstore.pool import PagePool
from quire.kvstore.prefix_index import PageId
from quire.replicas.config import StoreConfig
from quire.replicas.hand_over import HandOver
from quire.replicas.scheduler import SeqId
from quire.replicas.sequence import Sequence


class Neighbours(Protocol):
    """The way to the other replicas of a deployment and to its directory. No call waits for anybody."""

    def say(self, to: ReplicaId, message: Message, failed: Callable[[], None]) -> None:
        """Carry a message there; `failed` is called, from some thread, if it did not arrive."""

    def lookup(self, chain: Seq[BlockKey], answer: Callable[[tuple[Holder, ...]], None]) -> None:
        """Ask who holds the leading blocks of a chain; `answer` is called from some thread, if at all."""

    def added(self, keys: Seq[BlockKey]) -> None:
        """These blocks are here now."""

    def removed(self, keys: Seq[BlockKey]) -> None:
        """These are not any more."""


class Shards(Protocol):
    """Who carries out the orders of transfers."""

    def carry_out(self, order: Order, report: Callable[[Moved], None]) -> None: ...


@dataclass(slots=True)
class _Pending:
    """A sequence that waits for news of its prefix."""

    seq: Sequence
    keys: tuple[BlockKey, ...]
    """Of its prompt's blocks, those that are here included."""
    until_s: float
    """How long it waits for the directory."""
    transfer: TransferId | None = None
    others: tuple[Holder, ...] = ()
    """Whom to ask if the one that is asked does not answer or has not what it was said to have."""


@dataclass(frozen=True, slots=True)
class _Tried:
    """On what grounds a prefix was fetched, or computed."""

    decision: Decision
    since_s: float


@dataclass(frozen=True, slots=True)
class _Heard:
    sender: ReplicaId
    message: Message


@dataclass(frozen=True, slots=True)
class _Gone:
    peer: ReplicaId


@dataclass(frozen=True, slots=True)
class _Leave:
    peers: tuple[ReplicaId, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    seq: SeqId
    holders: tuple[Holder, ...]


_OTHERS_MAY = frozenset({Cause.PEER, Cause.REFUSED, Cause.BUSY})
"""Failures that cost next to no time and say nothing about other holders."""

_News = _Heard | _Gone | _Leave | _Answer | Moved


class Alone:
    """An engine without neighbours."""

    has_news = hands_over = False
    next_deadline_s: float | None = None
    fetch_pace: tuple[float, float] | None = None

    def __init__(self) -> None:
        self.stats = TransferStats()
        self.choices: Mapping[str, int] = {}

    def holds_back(self, seq: SeqId) -> bool:
        return False

    def held_pages(self) -> list[PageId]:
        return []

    def hear(self, sender: ReplicaId, message: Message) -> None: ...
    def leave(self, peers: Seq[ReplicaId]) -> None: ...
    def consider(self, seq: Sequence, here: int, now_s: float) -> None: ...
    def forget(self, seq: SeqId) -> None: ...
    def computed(self, seq: SeqId, now_s: float) -> None: ...
    def prefilled(self, tokens: int, seconds: float, before: float, now_s: float) -> None: ...
    def published(self, keys: Seq[BlockKey]) -> None: ...
    def evicted(self, keys: Seq[BlockKey]) -> None: ...
    def poll(self, now_s: float, queued_tokens: int) -> None: ...


class BlockSharing:
    """One replica's part in the store."""

    def __init__(
        self,
        pool: PagePool,
        exchange: Exchange,
        shards: Shards,
        neighbours: Neighbours,
        config: StoreConfig,
        *,
        page_tokens: int,
        block_bytes: int,
        wake: Callable[[], None],
    ) -> None:
        """`block_bytes`: of a block on all shards. `wake`: called by other threads after they left news."""
        self._pool, self._exchange, self._shards, self._neighbours = pool, exchange, shards, neighbours
        self._config, self._page_tokens, self._block_bytes = config, page_tokens, block_bytes
        self._wake = wake
        self._cost = CostModel()
        self._inbox: deque[_News] = deque()
        self._pending: dict[SeqId, _Pending] = {}
        self._fetching: dict[TransferId, _Tried] = {}
        self._transfer_of: dict[BlockKey, TransferId] = {}
        """The first block of each fetch under way: who wants the same waits for it, too."""
        self._computing: dict[SeqId, _Tried] = {}
        self._hand_over = HandOver(exchange.space)

    @property
    def stats(self) -> TransferStats:
        return self._exchange.stats

    @property
    def choices(self) -> Mapping[str, int]:
        """How often blocks that another replica held were fetched, and how often computed all the same."""
        made = self._cost.stats
        return {Choice.FETCH.value: made.fetches, Choice.RECOMPUTE.value: made.recomputes}

    @property
    def has_news(self) -> bool:
        return bool(self._inbox)

    @property
    def fetch_pace(self) -> tuple[float, float] | None:
        """Seconds of a fetch before its first byte, and for each token. None: none was made."""
        if (line := self._cost.fetch_line) is None:
            return None
        return line[0], line[1] * self._block_bytes / self._page_tokens

    @property
    def next_deadline_s(self) -> float | None:
        """When `poll` has something to give up."""
        lookups = [p.until_s for p in self._pending.values() if p.transfer is None]
        transfers = self._exchange.next_deadline_s
        return min([*lookups, *([] if transfers is None else [transfers])], default=None)

    @property
    def hands_over(self) -> bool:
        """Whether one of those that stay may still want something, or reads pages here."""
        return self._hand_over.open or bool(self._exchange.loans)

    def holds_back(self, seq: SeqId) -> bool:
        """Whether the sequence should not be admitted yet."""
        return seq in self._pending

    def held_pages(self) -> list[PageId]:
        """For the pool's `check`."""
        return list(self._exchange.held_pages())

    # ---- from other threads

    def hear(self, sender: ReplicaId, message: Message) -> None:
        """A neighbour's message."""
        self._put(_Heard(sender, message))

    def peer_gone(self, peer: ReplicaId) -> None:
        """A neighbour is dead or cannot be reached."""
        self._put(_Gone(peer))

    def leave(self, peers: Seq[ReplicaId]) -> None:
        """Offer the hottest blocks to these, who stay; `hands_over` until they have what they want."""
        self._hand_over.begin(peers)
        self._put(_Leave(tuple(peers)))

    def _put(self, news: _News) -> None:
        self._inbox.append(news)
        self._wake()

    # ---- from the engine's thread

    def consider(self, seq: Sequence, here: int, now_s: float) -> None:
        """A sequence has come, `here` blocks of whose prompt this replica has: ask who holds the others."""
        keys = tuple(seq.shareable_keys())
        self._hand_over.used(keys)
        if len(keys) - here < self._config.min_fetch_blocks:
            return
        self._pending[seq.id] = _Pending(seq, keys, now_s + self._config.lookup_timeout_s)
        if (holder := seq.progress.request.computed_by) is not None:
            self._put(_Answer(seq.id, (Holder(holder, len(keys)),)))
        else:
            self._neighbours.lookup(keys, lambda holders: self._put(_Answer(seq.id, holders)))

    def forget(self, seq: SeqId) -> None:
        """The sequence has ended."""
        self._pending.pop(seq, None)
        self._computing.pop(seq, None)

    def computed(self, seq: SeqId, now_s: float) -> None:
        """The sequence's prompt has been computed."""
        if (tried := self._computing.pop(seq, None)) is not None:
            self._cost.recomputed(now_s - tried.since_s, tried.decision)

    def prefilled(self, tokens: int, seconds: float, before: float, now_s: float) -> None:
        """A step computed so many tokens of prompts, which stood behind so many others on average."""
        self._cost.prefilled(tokens, seconds, now_s, before)

    def published(self, keys: Seq[BlockKey]) -> None:
        """Blocks that others may have."""
        if keys:
            self._neighbours.added(keys)

    def evicted(self, keys: Seq[BlockKey]) -> None:
        """Blocks that have made room."""
        self._neighbours.removed(keys)

    def poll(self, now_s: float, queued_tokens: int) -> None:
        """Take the news in, give up what is late, do what follows. `queued_tokens`: of prompts to compute."""
        while self._inbox:
            match self._inbox.popleft():
                case _Heard(sender, Leaving() as leaving):
                    self._hand_over.offered(sender, leaving)
                case _Heard(sender, Taken()):
                    self._hand_over.answered(sender)
                case _Heard(sender, message):
                    self._exchange.handle(sender, message, now_s)
                case _Gone(peer):
                    self._exchange.peer_gone(peer, now_s)
                    self._hand_over.answered(peer)
                case Moved() as report:
                    self._exchange.moved(report, now_s)
                case _Leave(peers):
                    for peer, leaving in self._hand_over.will(peers):
                        self._say(peer, leaving)
                case _Answer(seq, holders):
                    self._answered(seq, holders, queued_tokens, now_s)
        self._exchange.expire(now_s)
        self._inherit(now_s)
        for seq, pending in list(self._pending.items()):
            if pending.transfer is None and now_s > pending.until_s:
                del self._pending[seq]
        while effects := self._exchange.take():
            for effect in effects:
                match effect:
                    case Say(to, said):
                        self._say(to, said)
                    case Fetched():
                        self._fetched(effect, queued_tokens, now_s)
                    case Tell(order):
                        self._shards.carry_out(order, self._put)
            self._inherit(now_s)

    def _answered(self, seq: SeqId, holders: tuple[Holder, ...], queued_tokens: int, now_s: float) -> None:
        """Fetch from whoever holds most, if that is sooner than computing."""
        pending = self._pending.get(seq)
        if pending is None or pending.transfer is not None:
            return
        here, _ = self._pool.lookup(pending.keys)
        best, *others = sorted(holders, key=lambda holder: -holder.blocks) or (None,)
        if best is None or best.blocks - here < self._config.min_fetch_blocks:
            del self._pending[seq]
            return
        pending.others = tuple(others)
        wanted = pending.keys[here : best.blocks]
        if (transfer := self._transfer_of.get(wanted[0])) is not None:
            pending.transfer = transfer
            return
        if best.owner == pending.seq.progress.request.computed_by:  # so that it need not be computed here
            decision = Decision(Choice.FETCH, None, None)
        else:
            decision = self._cost.decide(
                best.owner,
                len(wanted) * self._block_bytes,
                len(wanted) * self._page_tokens,
                queued_tokens,
                now_s,
                here * self._page_tokens,
            )
        tried = _Tried(decision, now_s)
        if decision.choice is Choice.FETCH:
            try:
                pending.transfer = self._exchange.fetch(best.owner, wanted, now_s)
            except TransferFailed:
                self._cost.not_tried(best.owner)
                del self._pending[seq]
            else:
                self._fetching[pending.transfer] = tried
                self._transfer_of[wanted[0]] = pending.transfer
            return
        self._computing[seq] = tried
        del self._pending[seq]

    def _say(self, to: ReplicaId, message: Message) -> None:
        self._neighbours.say(to, message, partial(self.peer_gone, to))

    def _inherit(self, now_s: float) -> None:
        """Fetch what was offered, as far as there are free pages: nobody's blocks make room for it."""
        while self._hand_over.legacy:
            owner, chain = self._hand_over.legacy[0]
            wanted = chain[self._pool.lookup(chain)[0] :][: self._pool.free]
            if wanted and wanted[0] not in self._transfer_of:
                try:
                    transfer = self._exchange.fetch(owner, wanted, now_s)
                except TransferFailed:
                    break  # as many as may be are under way: later
                self._fetching[transfer] = _Tried(Decision(Choice.FETCH, None, None), now_s)
                self._transfer_of[wanted[0]] = transfer
            self._hand_over.legacy.popleft()
        for leaver in self._hand_over.satisfied(self._exchange.fetches_from):
            self._say(leaver, Taken())

    def _fetched(self, effect: Fetched, queued_tokens: int, now_s: float) -> None:
        """Well or not, the sequences that waited for it are admitted now, or ask the next holder."""
        decision = self._fetching.pop(effect.transfer).decision
        del self._transfer_of[effect.keys[0]]
        if effect.failure is None:
            self._cost.fetched(effect.owner, effect.bytes_moved, effect.seconds, now_s, decision)
            self.published(effect.keys[: effect.blocks])
        else:
            self._cost.failed(effect.owner, effect.seconds, now_s, decision)
        for seq, pending in list(self._pending.items()):
            if pending.transfer != effect.transfer:
                continue
            pending.seq.fetched_blocks += effect.blocks
            if effect.failure in _OTHERS_MAY and pending.others:
                pending.transfer = None
                self._answered(seq, pending.others, queued_tokens, now_s)
            else:
                del self._pending[seq]
