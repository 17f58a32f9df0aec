"""What the engine does with its neighbours' blocks: looks them up, weighs fetching against computing, lends.

Runs on the engine's thread, as the pool does whose pages it fills. Other threads only put into its inbox.

    a prompt with blocks that are not here
      LOOKED UP  ── holders ─→ decide ── fetch ─→ FETCHING ── blocks are in the pool ─→ admitted, shared
          └── no answer in time, nobody holds them, or computing is sooner ──→ admitted, computed

While a sequence is looked up or fetched for, it waits and holds nobody up. Whatever fails ends in computing.
Where a request says who has just computed its prompt, that replica is asked at once.

Transfers themselves, and what a replica that goes hands over, are carried out by `kvstore/peers/peer.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.pool import PagePool
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.cost import Choice, CostModel, Decision, PrefillPace
from quire.kvstore.peers.directory import Holder
from quire.kvstore.peers.exchange import Exchange, FetchDone, TransferStats
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import Message
from quire.kvstore.peers.peer import Peer, Shards
from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.replicas.config import StoreConfig
from quire.replicas.engine.scheduler import SeqId
from quire.replicas.engine.sequence import Sequence


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
class _Attempt:
    """On what grounds a prefix was fetched, or computed."""

    decision: Decision
    since_s: float


@dataclass(frozen=True, slots=True)
class _Answer:
    seq: SeqId
    holders: tuple[Holder, ...]


_UNCONDITIONAL = Decision(Choice.FETCH, None, None)
"""Of a fetch that the cost model was not asked about."""
_RETRYABLE_ELSEWHERE = frozenset({Cause.PEER, Cause.REFUSED, Cause.BUSY})
"""Failures that cost next to no time and say nothing about other holders."""


class Alone:
    """An engine without neighbours."""

    has_news = hands_over = False
    next_deadline_s: float | None = None
    fetch_pace: tuple[float, float] | None = None

    def __init__(self) -> None:
        self.stats = TransferStats()
        self.choices: Mapping[str, int] = {}
        self.prefill = PrefillPace()

    def holds_back(self, seq: SeqId) -> bool:
        return False

    def held_pages(self) -> list[PageId]:
        return []

    def hear(self, sender: ReplicaId, message: Message) -> None: ...
    def leave(self, peers: Seq[ReplicaId]) -> None: ...
    def consider(self, seq: Sequence, here: int, now_s: float) -> None: ...
    def forget(self, seq: SeqId) -> None: ...
    def computed(self, seq: SeqId, now_s: float) -> None: ...
    def published(self, keys: Seq[BlockKey]) -> None: ...
    def evicted(self, keys: Seq[BlockKey]) -> None: ...
    def poll(self, now_s: float, queued_tokens: int) -> None: ...

    def prefilled(self, tokens: int, seconds: float, before: float, now_s: float) -> None:
        if tokens and seconds > 0:
            self.prefill.add(tokens, seconds, before)


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
        self._pool, self._exchange, self._neighbours = pool, exchange, neighbours
        self._peer = Peer(pool, exchange, shards, neighbours.say, wake)
        self._config, self._page_tokens, self._block_bytes = config, page_tokens, block_bytes
        self._wake = wake
        self._cost = CostModel()
        self._answers: deque[_Answer] = deque()
        self._pending: dict[SeqId, _Pending] = {}
        self._fetching: dict[TransferId, _Attempt] = {}
        self._computing: dict[SeqId, _Attempt] = {}

    @property
    def stats(self) -> TransferStats:
        return self._exchange.stats

    @property
    def choices(self) -> Mapping[str, int]:
        """How often blocks that another replica held were fetched, and how often computed all the same."""
        made = self._cost.stats
        return {Choice.FETCH.value: made.fetches, Choice.RECOMPUTE.value: made.recomputes}

    @property
    def prefill(self) -> PrefillPace:
        """How long computing prompts takes here: measured once, for all who ask."""
        return self._cost.prefill

    @property
    def has_news(self) -> bool:
        return bool(self._answers) or self._peer.has_news

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
        return self._peer.is_draining

    def holds_back(self, seq: SeqId) -> bool:
        """Whether the sequence should not be admitted yet."""
        return seq in self._pending

    def held_pages(self) -> list[PageId]:
        """For the pool's `check`."""
        return list(self._exchange.held_pages())

    # ---- from other threads

    def hear(self, sender: ReplicaId, message: Message) -> None:
        """A neighbour's message."""
        self._peer.on_message(sender, message)

    def leave(self, peers: Seq[ReplicaId]) -> None:
        """Offer the hottest blocks to these, who stay; `hands_over` until they have what they want."""
        self._peer.drain(peers)

    def _answer(self, seq: SeqId, holders: tuple[Holder, ...]) -> None:
        self._answers.append(_Answer(seq, holders))
        self._wake()

    # ---- from the engine's thread

    def consider(self, seq: Sequence, here: int, now_s: float) -> None:
        """A sequence has come, `here` blocks of whose prompt this replica has: ask who holds the others."""
        keys = tuple(seq.shareable_keys())
        self._peer.used(keys)
        if len(keys) - here < self._config.min_fetch_blocks:
            return
        self._pending[seq.id] = _Pending(seq, keys, now_s + self._config.lookup_timeout_s)
        if (holder := seq.progress.request.computed_by) is not None:
            self._answer(seq.id, (Holder(holder, len(keys)),))
        else:
            self._neighbours.lookup(keys, partial(self._answer, seq.id))

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
        while self._answers:
            answer = self._answers.popleft()
            self._answered(answer.seq, answer.holders, queued_tokens, now_s)
        while done := self._peer.poll(now_s):
            for fetch in done:
                self._fetched(fetch, queued_tokens, now_s)
        for seq, pending in list(self._pending.items()):
            if pending.transfer is None and now_s > pending.until_s:
                del self._pending[seq]

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
        if (transfer := self._exchange.fetching(wanted[0])) is not None:
            pending.transfer = transfer
            return
        if best.owner == pending.seq.progress.request.computed_by:  # so that it need not be computed here
            decision = _UNCONDITIONAL
        else:
            decision = self._cost.decide(
                best.owner,
                len(wanted) * self._block_bytes,
                len(wanted) * self._page_tokens,
                queued_tokens,
                now_s,
                here * self._page_tokens,
            )
        tried = _Attempt(decision, now_s)
        if decision.choice is Choice.FETCH:
            try:
                pending.transfer = self._exchange.fetch(best.owner, wanted, now_s)
            except TransferFailed:
                self._cost.not_tried(best.owner)
                del self._pending[seq]
            else:
                self._fetching[pending.transfer] = tried
            return
        self._computing[seq] = tried
        del self._pending[seq]

    def _fetched(self, fetch: FetchDone, queued_tokens: int, now_s: float) -> None:
        """Well or not, the sequences that waited for it are admitted now, or ask the next holder."""
        attempt = self._fetching.pop(fetch.transfer, None)
        decision = attempt.decision if attempt else _UNCONDITIONAL  # what another replica offered
        if fetch.failure is None:
            self._cost.fetched(fetch.owner, fetch.bytes_moved, fetch.seconds, now_s, decision)
            self.published(fetch.keys[: fetch.blocks])
        else:
            self._cost.failed(fetch.owner, fetch.seconds, now_s, decision)
        for seq, pending in list(self._pending.items()):
            if pending.transfer != fetch.transfer:
                continue
            pending.seq.fetched_blocks += fetch.blocks
            if fetch.failure in _RETRYABLE_ELSEWHERE and pending.others:
                pending.transfer = None
                self._answered(seq, pending.others, queued_tokens, now_s)
            else:
                del self._pending[seq]
