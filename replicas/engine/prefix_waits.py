"""Which sequences wait for blocks of other replicas, and whether those are fetched or computed.

    a prompt with blocks that are not here
      LOOKED UP  ── holders ─→ decide ── fetch ─→ FETCHING ── blocks are in the pool ─→ admitted, shared
          └── no answer in time, no holders, or computing is faster ──→ admitted, computed

A sequence that waits is not admitted and holds up no other one. Whatever fails ends in computing. Where a
request says which replica has just computed its prompt, that replica is asked at once.

Runs on the engine's thread, as the pool does whose pages are filled. Transfers are `kvstore/peers/peer.py`'s.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.books.pool import PagePool
from quire.kvstore.peers.cost import Choice, CostModel, Decision, PrefillPace
from quire.kvstore.peers.directory import Holder
from quire.kvstore.peers.exchange import Exchange, FetchDone
from quire.kvstore.peers.ids import TransferId
from quire.kvstore.peers.network import NoPeers, PeerNetwork
from quire.kvstore.peers.peer import Peer
from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.replicas.config import StoreConfig
from quire.replicas.engine.scheduler import SeqId
from quire.replicas.engine.sequence import Sequence


@dataclass(slots=True)
class _Wait:
    """A sequence that waits for its prefix."""

    seq: Sequence
    keys: tuple[BlockKey, ...]
    """The keys of its prompt's blocks, those that are here included."""
    until_s: float
    """How long it waits for the directory."""
    transfer: TransferId | None = None
    others: tuple[Holder, ...] = ()
    """Replicas to ask if the one that is asked does not answer or does not hold what it was said to."""


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Why a prefix was fetched, or computed."""

    decision: Decision
    since_s: float


_UNCONDITIONAL = Decision(Choice.FETCH, None, None)
"""The decision for a fetch that the cost model was not asked about."""
_RETRYABLE_ELSEWHERE = frozenset({Cause.PEER, Cause.REFUSED, Cause.BUSY})
"""Failures that cost next to no time and say nothing about other holders."""


class PrefixWaits:
    """The sequences of one engine that wait for blocks of other replicas."""

    def __init__(
        self,
        pool: PagePool,
        peer: Peer,
        network: PeerNetwork,
        config: StoreConfig,
        *,
        page_tokens: int,
        block_bytes: int,
        wake: Callable[[], None],
    ) -> None:
        """`block_bytes`: of a block on all shards. `wake`: called by other threads with reports."""
        self.peer, self.network = peer, network
        self._pool, self._config, self._wake = pool, config, wake
        self._page_tokens, self._block_bytes = page_tokens, block_bytes
        self._cost = CostModel()
        self._answers: deque[tuple[SeqId, tuple[Holder, ...]]] = deque()
        self._waits: dict[SeqId, _Wait] = {}
        self._fetching: dict[TransferId, _Attempt] = {}
        self._computing: dict[SeqId, _Attempt] = {}

    @staticmethod
    def without_peers(pool: PagePool) -> PrefixWaits:
        """Return the ledger of an engine that shares no blocks: no sequence ever waits in it."""
        alone = NoPeers()
        peer = Peer(pool, Exchange(pool, b"", (), kv_heads=1), alone, alone.send)
        config = StoreConfig(min_fetch_blocks=sys.maxsize)
        return PrefixWaits(pool, peer, alone, config, page_tokens=1, block_bytes=1, wake=lambda: None)

    @property
    def choices(self) -> Mapping[str, int]:
        """How often blocks that another replica held were fetched, and how often computed all the same."""
        made = self._cost.stats
        return {Choice.FETCH.value: made.fetches, Choice.RECOMPUTE.value: made.recomputes}

    @property
    def prefill(self) -> PrefillPace:
        """How long computing prompts takes here: measured once, for every use."""
        return self._cost.prefill

    @property
    def has_news(self) -> bool:
        """Whether `poll` has something to take in."""
        return bool(self._answers) or self.peer.has_news

    @property
    def fetch_pace(self) -> tuple[float, float] | None:
        """Seconds of a fetch before its first byte, and for each token. None: there was no fetch yet."""
        if (line := self._cost.fetch_line) is None:
            return None
        return line[0], line[1] * self._block_bytes / self._page_tokens

    @property
    def next_deadline_s(self) -> float | None:
        """When `poll` has something to give up."""
        lookups = [wait.until_s for wait in self._waits.values() if wait.transfer is None]
        transfers = self.peer.exchange.next_deadline_s
        return min([*lookups, *([] if transfers is None else [transfers])], default=None)

    def is_waiting(self, seq: SeqId) -> bool:
        """Whether the sequence should not be admitted yet."""
        return seq in self._waits

    # ---- from the engine's thread

    def expect(self, seq: Sequence, here: int, now_s: float) -> None:
        """Ask who holds a new sequence's blocks. This replica has the first `here` blocks of its prompt."""
        keys = tuple(seq.shareable_keys())
        self.peer.used(keys)
        if len(keys) - here < self._config.min_fetch_blocks:
            return
        self._waits[seq.id] = _Wait(seq, keys, now_s + self._config.lookup_timeout_s)
        if (holder := seq.progress.request.computed_by) is not None:
            self._answer(seq.id, (Holder(holder, len(keys)),))
        else:
            self.network.lookup(keys, partial(self._answer, seq.id))

    def forget(self, seq: SeqId) -> None:
        """Stop waiting for a sequence that has ended."""
        self._waits.pop(seq, None)
        self._computing.pop(seq, None)

    def computed(self, seq: SeqId, now_s: float) -> None:
        """Take note that the sequence's prompt has been computed."""
        if (attempt := self._computing.pop(seq, None)) is not None:
            self._cost.recomputed(now_s - attempt.since_s, attempt.decision)

    def prefilled(self, tokens: int, seconds: float, context_tokens: float, now_s: float) -> None:
        """Take note of a step's prompt tokens, which came after `context_tokens` others on average."""
        self._cost.prefilled(tokens, seconds, now_s, context_tokens)

    def poll(self, now_s: float, queued_tokens: int) -> None:
        """Take reports in, give up what is late, act on it. `queued_tokens`: prompt tokens to compute."""
        while self._answers:
            seq, holders = self._answers.popleft()
            self._decide(seq, holders, queued_tokens, now_s)
        while done := self.peer.poll(now_s):
            for fetch in done:
                self._fetched(fetch, queued_tokens, now_s)
        for seq, wait in list(self._waits.items()):
            if wait.transfer is None and now_s > wait.until_s:
                del self._waits[seq]

    def _answer(self, seq: SeqId, holders: tuple[Holder, ...]) -> None:
        """From any thread: these replicas hold leading blocks of the sequence's prompt."""
        self._answers.append((seq, holders))
        self._wake()

    def _decide(self, seq: SeqId, holders: tuple[Holder, ...], queued_tokens: int, now_s: float) -> None:
        """Fetch from the replica that holds most, if that is faster than computing."""
        wait = self._waits.get(seq)
        if wait is None or wait.transfer is not None:
            return
        here, _ = self._pool.lookup(wait.keys)
        best, *others = sorted(holders, key=lambda holder: -holder.blocks) or (None,)
        if best is None or best.blocks - here < self._config.min_fetch_blocks:
            del self._waits[seq]
            return
        wait.others = tuple(others)
        wanted = wait.keys[here : best.blocks]
        if (transfer := self.peer.exchange.fetching(wanted[0])) is not None:
            wait.transfer = transfer
            return
        if best.owner == wait.seq.progress.request.computed_by:  # so that it need not be computed here
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
        attempt = _Attempt(decision, now_s)
        if decision.choice is Choice.FETCH:
            try:
                wait.transfer = self.peer.exchange.fetch(best.owner, wanted, now_s)
            except TransferFailed:
                self._cost.not_tried(best.owner)
                del self._waits[seq]
            else:
                self._fetching[wait.transfer] = attempt
            return
        self._computing[seq] = attempt
        del self._waits[seq]

    def _fetched(self, fetch: FetchDone, queued_tokens: int, now_s: float) -> None:
        """Admit the sequences that waited for a fetch, however it ended, or ask the next holder."""
        attempt = self._fetching.pop(fetch.transfer, None)
        decision = attempt.decision if attempt else _UNCONDITIONAL  # what another replica offered
        if fetch.failure is None:
            self._cost.fetched(fetch.owner, fetch.bytes_moved, fetch.seconds, now_s, decision)
            if fetch.blocks:
                self.network.added(fetch.keys[: fetch.blocks])
        else:
            self._cost.failed(fetch.owner, fetch.seconds, now_s, decision)
        for seq, wait in list(self._waits.items()):
            if wait.transfer != fetch.transfer:
                continue
            wait.seq.fetched_blocks += fetch.blocks
            if fetch.failure in _RETRYABLE_ELSEWHERE and wait.others:
                wait.transfer = None
                self._decide(seq, wait.others, queued_tokens, now_s)
            else:
                del self._waits[seq]
