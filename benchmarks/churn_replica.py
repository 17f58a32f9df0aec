"""A replica of the store alone, driven as an engine drives it; it compares every byte that it serves.

Knows neither when replicas come and go nor what the counts mean: `churn.py` does. A block's bytes follow from
its key, and pages that were evicted are overwritten.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.books.pool import IntegrityError, PagePool
from quire.kvstore.books.prefix_index import PageId
from quire.kvstore.peers.announcer import Announcer
from quire.kvstore.peers.directory import Announcement, Directory, Holder
from quire.kvstore.peers.exchange import Exchange, ExchangeConfig, FetchDone
from quire.kvstore.peers.ids import ReplicaId, TransferId
from quire.kvstore.peers.messages import Message, decode_message, encode_message
from quire.kvstore.peers.mover import PageMover, ShardPool
from quire.kvstore.peers.peer import Peer
from quire.kvstore.wire.failures import TransferFailed
from quire.kvstore.wire.tcp import TcpTransport
from quire.kvstore.wire.transport import LinkConfig

HOST = "127.0.0.1"
HEADS, PAGE_TOKENS = 4, 16
LAYOUT = PageLayout(layer_formats("int8", 2), HEADS, 64, PAGE_TOKENS)
PAGES, CHUNK_BYTES = 96, 64_000  # of a pool; a chunk is a few pages
GROUPS, TAILS, SHARED, BLOCKS = 100, 4, 6, 16  # chains of a group share their first blocks
ENTRIES = 1024  # of the directory; 100 * (6 + 4 * 10) blocks can exist
LINKS = LinkConfig(operation_timeout_s=1.0, max_links=4)
TRANSFERS = ExchangeConfig(timeout_s=3.0)
SILENCE_S, ALIVE_S = 4.0, 1.0
PAUSE_S = 0.8  # between requests, in the mean
GRACE_S = 1.0  # a thread of hundreds on two cores may notice a deadline this much later
STALLS, CLEARANCES = 0.01, 0.03  # how often they take the place of a request


def all_chains() -> list[list[BlockKey]]:
    space = KeySpace(LAYOUT.fingerprint, b"model", b"")
    heads = [
        extend_chain(space.root(str(g)), range(PAGE_TOKENS * SHARED), PAGE_TOKENS) for g in range(GROUPS)
    ]
    tail = range(PAGE_TOKENS * (BLOCKS - SHARED))
    return [
        head + extend_chain(head[-1], [token + 1000 * t for token in tail], PAGE_TOKENS)
        for head in heads
        for t in range(TAILS)
    ]


_NOISE_B = torch.randint(0, 256, (LAYOUT.page_bytes,), dtype=torch.uint8)


def block_bytes(key: BlockKey) -> Tensor:
    """[page bytes]: what the block of this name holds, on whichever replica."""
    key_B = torch.frombuffer(bytearray(key), dtype=torch.uint8)
    return key_B.repeat(-(-LAYOUT.page_bytes // len(key)))[: LAYOUT.page_bytes] ^ _NOISE_B


class Counts:
    """What happened, by name; counted by all threads."""

    def __init__(self) -> None:
        self._counter: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counter[name] += number

    def snapshot(self) -> Counter[str]:
        with self._lock:
            return self._counter.copy()


class Desk:
    """The directory as an actor would be: one call at a time. An announcer's `Channel`."""

    def __init__(self) -> None:
        self._directory = Directory(ENTRIES, SILENCE_S)
        self._lock = threading.Lock()
        self.most_entries = self.most_owners = self.evicted = 0

    def announce(self, said: Announcement) -> bool:
        with self._lock:
            taken = self._directory.announce(said, time.monotonic())
            stats = self._directory.stats()
            self.most_entries = max(self.most_entries, stats.entries)
            self.most_owners = max(self.most_owners, stats.owners)
            self.evicted = stats.evicted
            return taken

    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]:
        with self._lock:
            return self._directory.lookup(chain)

    def gone(self, owner: ReplicaId) -> None:
        with self._lock:
            self._directory.gone(owner)


@dataclass
class World:
    """What the replicas share."""

    chains: list[list[BlockKey]]
    desk: Desk = field(default_factory=Desk)
    counts: Counts = field(default_factory=Counts)
    peers: dict[ReplicaId, Peer] = field(default_factory=dict)
    quiet: threading.Event = field(default_factory=threading.Event)
    """No more requests are sent, and no replica leaves."""
    over: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True)
class _Request:
    keys: list[BlockKey]
    held: list[PageId]
    """Pages of the leading blocks that were here."""
    allowed_s: float
    """For its fetch."""


class Replica:
    """One incarnation, driven by the thread that made it."""

    def __init__(self, name: ReplicaId, world: World, rng: random.Random) -> None:
        self.name, self._world, self._rng = name, world, rng
        self._announcer = announcer = Announcer(name, world.desk, idle_s=ALIVE_S)
        self._announcer.start()
        self._pool = PagePool(PAGES, lambda blocks: announcer.removed([key for key, _ in blocks]))
        self._pool_NB = torch.zeros(PAGES, LAYOUT.page_bytes, dtype=torch.uint8)
        self._transport = TcpTransport(HOST, LINKS)
        shard = ShardPool(self._pool_NB, LAYOUT, 0, 1, HEADS)
        self._mover = PageMover(shard, self._transport, chunk_bytes=CHUNK_BYTES)
        endpoints = [self._transport.endpoint]
        self._exchange = Exchange(self._pool, LAYOUT.fingerprint, endpoints, TRANSFERS, kv_heads=HEADS)
        self._requests: dict[TransferId, _Request] = {}
        self._woken = threading.Event()
        self._peer = world.peers[name] = Peer(
            self._pool, self._exchange, self._mover, self._send, self._woken.set
        )

    def live(self, until_s: float) -> None:
        """Ask, fetch and lend, until it is time to leave or everything is over."""
        world, next_s = self._world, time.monotonic()
        while not world.over.is_set() and (time.monotonic() < until_s or world.quiet.is_set()):
            if time.monotonic() >= next_s and not world.quiet.is_set():
                next_s = time.monotonic() + self._rng.expovariate(1 / PAUSE_S)
                self._something()
            self._woken.wait(min(max(next_s - time.monotonic(), 0.001), 0.2))
            self._woken.clear()
            for done in self._peer.poll(time.monotonic()):
                self._fetched(done)

    def leave(self) -> None:
        """Without a goodbye."""
        del self._world.peers[self.name]
        self._announcer.close()
        if self._rng.random() < 0.5:
            self._world.desk.gone(self.name)
        self._transport.close()

    def unaccounted(self) -> int:
        """Pages that are not free or cached although nothing goes on, or that the books contradict."""
        held = [page for request in self._requests.values() for page in request.held]
        self._world.counts.add("fetches never ended", len(self._requests))
        try:
            self._pool.check([*held, *self._exchange.held_pages()])
        except IntegrityError as error:
            print(f"{self.name}: {error}", flush=True)
            return max(self._pool.used, 1)
        for chain in self._world.chains:
            self._served(chain)
        return self._pool.used

    # ---- what an engine does

    def _something(self) -> None:
        chance = self._rng.random()
        if chance < STALLS:
            self._stall(1.5 * TRANSFERS.timeout_s)
        elif chance < STALLS + CLEARANCES:
            self._compute([], min(self._rng.randrange(PAGES), self._pool.available))
        else:
            self._ask(self._rng.choice(self._world.chains)[: self._rng.randint(1, BLOCKS)])

    def _stall(self, seconds: float) -> None:
        self._world.counts.add("stalls")
        for request in self._requests.values():
            request.allowed_s += seconds
        time.sleep(seconds)

    def _ask(self, keys: list[BlockKey]) -> None:
        """A request whose prompt has these blocks."""
        counts, here, now_s = self._world.counts, self._served(keys), time.monotonic()
        counts.add("requests")
        held = self._pool.share(keys)
        request = _Request(keys, held, TRANSFERS.timeout_s + GRACE_S)
        holders = [h for h in self._world.desk.lookup(keys) if h.owner != self.name and h.blocks > here]
        if not holders:
            self._finish(request)
            return
        try:
            wanted = keys[here : holders[0].blocks]
            self._requests[self._exchange.fetch(holders[0].owner, wanted, now_s)] = request
            counts.add("fetches")
        except TransferFailed as error:
            counts.add(f"not begun: {error.cause}")
            self._finish(request)

    def _finish(self, request: _Request) -> None:
        """Compute what is not here now."""
        here, _ = self._pool.lookup(request.keys)
        rest = request.keys[here:]
        if len(rest) <= self._pool.available:
            self._compute(rest, len(rest))
        else:
            self._world.counts.add("requests without room")
        self._pool.release(request.held)

    def _compute(self, keys: Sequence[BlockKey], count: int) -> None:
        """`count` pages: blocks of these names, or none, which only overwrites what was there."""
        pages = self._pool.allocate(count)
        self._pool_NB[pages] = 0xEE
        for key, page in zip(keys, pages, strict=False):
            self._pool_NB[page] = block_bytes(key)
            self._pool.publish(key, page)
        self._announcer.added(keys)
        self._pool.release(pages)

    def _served(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks of `keys` are here. Compares every byte of them."""
        pages = self._pool.share(keys)
        wrong = [
            f"{key.hex()[:12]} in page {page}"
            for key, page in zip(keys, pages, strict=False)
            if not torch.equal(self._pool_NB[page], block_bytes(key))
        ]
        if wrong:
            print(f"{self.name}: wrong bytes of {', '.join(wrong)}", flush=True)
        self._world.counts.add("wrong pages", len(wrong))
        self._world.counts.add("pages compared", len(pages))
        self._pool.release(pages)
        return len(pages)

    # ---- transfers

    def _send(self, to: ReplicaId, message: Message, failed: Callable[[], None]) -> None:
        peer = self._world.peers.get(to)
        if peer is None:
            failed()
        else:
            peer.on_message(self.name, decode_message(encode_message(message)))

    def _fetched(self, done: FetchDone) -> None:
        counts, request = self._world.counts, self._requests.pop(done.transfer)
        if done.seconds > request.allowed_s:
            print(f"{self.name}: a fetch took {done.seconds:.1f} s: {done.reason}", flush=True)
            counts.add("fetches late")
        if done.failure is None:
            keys = done.keys[: done.blocks]
            self._announcer.added(keys)
            counts.add("pages fetched", self._served(keys))
            counts.add("fetched")
        else:
            counts.add(f"failed: {done.failure}")
        self._finish(request)
