"""Replicas of the store alone: a pool, an exchange and one mover per shard, driven as the engine would."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.books.pool import PagePool
from quire.kvstore.peers.exchange import Exchange, ExchangeConfig, FetchDone
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import CompletePages, Message, Moved, Order, decode_message, encode_message
from quire.kvstore.peers.mover import PageMover, ShardPool
from quire.kvstore.peers.peer import Peer
from quire.kvstore.peers.slices import shard_heads
from quire.kvstore.wire.open_transport import open_transport
from quire.kvstore.wire.transport import Endpoint, LinkConfig, Sink, Source, Ticket, Transport

HOST, CPU = "127.0.0.1", torch.device("cpu")
HEADS = 4
PACKED, ALONE = 20_000, 5_000
"""Sizes of a chunk: a few pages, or one."""
GPU_PATIENCE_S = {"timeout_s": 8.0, "patience_s": 3.0}  # a communicator connects in a second or two


def layout_of(kv: str, heads: int = 1) -> PageLayout:
    return PageLayout(layer_formats(kv, 2), heads, 16, 16)


def keys_of(count: int, seed: int = 0) -> list[BlockKey]:
    return extend_chain(KeySpace(b"l", b"m", b"t").root(str(seed)), list(range(16 * count)), 16)


def block_bytes(key: BlockKey, head_bytes: int) -> Tensor:
    """[heads, head_bytes]: what the block of this name holds, on whichever shards."""
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (HEADS, head_bytes), dtype=torch.uint8, generator=generator)


@dataclass
class Meddled:
    """A transport that does something whenever a chunk is given or taken."""

    inner: Transport
    read_chunk: Callable[[int, Tensor], None] | None = None
    write_chunk: Callable[[int, Tensor], None] | None = None

    @property
    def endpoint(self) -> Endpoint:
        return self.inner.endpoint

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Future[None]:
        return self.inner.send(peer, ticket, _MeddledSource(source, self.read_chunk), timeout_s)

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Future[None]:
        return self.inner.receive(peer, ticket, _MeddledSink(sink, self.write_chunk), timeout_s)

    def close(self) -> None:
        self.inner.close()


class _MeddledSource:
    def __init__(self, inner: Source, change: Callable[[int, Tensor], None] | None) -> None:
        self.sizes, self.buffers, self._inner, self._change = inner.sizes, inner.buffers, inner, change

    def read_chunk(self, index: int, buffer: Tensor) -> Tensor:
        chunk = self._inner.read_chunk(index, buffer)
        if self._change is None:
            return chunk
        changed = chunk.clone()  # it may lie in the pool
        self._change(index, changed)
        return changed


class _MeddledSink:
    def __init__(self, inner: Sink, change: Callable[[int, Tensor], None] | None) -> None:
        self.sizes, self.buffers, self._inner, self._change = inner.sizes, inner.buffers, inner, change

    def write_chunk(self, index: int, chunk: Tensor) -> None:
        if self._change is not None:
            self._change(index, chunk)
        self._inner.write_chunk(index, chunk)

    def synchronize(self) -> None:
        self._inner.synchronize()

    def verify(self) -> None:
        self._inner.verify()


@dataclass
class StorePeer:
    """One replica; all its shards live in this process."""

    name: ReplicaId
    tp: int = 1
    kv: str = "int8"
    pages: int = 64
    timeout_s: float = 3.0
    patience_s: float = 1.5
    """Of its links."""
    claims: str | None = None
    """The format that it says it has."""
    device: torch.device = CPU
    chunk_bytes: int = PACKED
    transports: list[Meddled] = field(init=False)
    fetched: list[FetchDone] = field(default_factory=list)
    send: Callable[[ReplicaId, Message], None] = lambda to, message: None
    """What carries its messages; at first nothing does."""

    def __post_init__(self) -> None:
        links = LinkConfig(operation_timeout_s=self.patience_s)
        self.transports = [Meddled(open_transport(HOST, self.device, links)) for _ in range(self.tp)]
        self.pool = PagePool(self.pages)
        self.shards: list[ShardPool] = []
        self.movers: list[PageMover] = []
        for rank, transport in enumerate(self.transports):
            layout = layout_of(self.kv, len(shard_heads(rank, self.tp, HEADS)))
            pool_NB = torch.zeros(self.pages, layout.page_bytes, dtype=torch.uint8, device=self.device)
            self.shards.append(ShardPool(pool_NB, layout, rank, self.tp, HEADS))
            self.movers.append(PageMover(self.shards[-1], transport, chunk_bytes=self.chunk_bytes))
        self.exchange = Exchange(
            self.pool,
            layout_of(self.claims or self.kv).fingerprint,
            [t.endpoint for t in self.transports],
            ExchangeConfig(timeout_s=self.timeout_s, max_lent_share=1.0),
            kv_heads=HEADS,
        )
        self.peer = Peer(self.pool, self.exchange, self, lambda to, message, failed: self.send(to, message))

    def execute(self, order: Order, report: Callable[[Moved], None]) -> None:
        for mover in self.movers:
            mover.execute(order, report)

    def cache(self, keys: Sequence[BlockKey]) -> list[int]:
        """Put the blocks of these names into the pool, as if they had been computed."""
        pages = self.pool.allocate(len(keys))
        for key, page in zip(keys, pages, strict=True):
            for shard in self.shards:
                heads = shard_heads(shard.rank, self.tp, HEADS)
                whole = block_bytes(key, shard.layout.head_bytes)
                shard.pool_NB[page] = whole[heads.start : heads.stop].flatten()
            self.pool.publish(key, page)
        self.pool.release(pages)
        return list(pages)

    def complete(self, keys: Sequence[BlockKey]) -> CompletePages:
        """What a replica tells its shards of blocks that it has just published."""
        pages = tuple(self.pool.share(keys))
        self.pool.release(pages)
        return CompletePages(pages, tuple(map(self.pool.generation, pages)))

    def holds(self, keys: Sequence[BlockKey]) -> bool:
        """All these blocks are here, and every byte of them on every shard is right."""
        pages = self.pool.share(keys)
        try:
            return len(pages) == len(keys) and all(
                torch.equal(
                    shard.pool_NB[page].cpu(),
                    block_bytes(key, shard.layout.head_bytes)[
                        slice(*(lambda r: (r.start, r.stop))(shard_heads(shard.rank, self.tp, HEADS)))
                    ].flatten(),
                )
                for key, page in zip(keys, pages, strict=True)
                for shard in self.shards
            )
        finally:
            self.pool.release(pages)

    def turn(self) -> None:
        """What the engine does between two steps."""
        self.fetched += self.peer.poll(time.monotonic())

    def check(self) -> None:
        self.pool.check(self.exchange.held_pages())

    def close(self) -> None:
        for transport in self.transports:
            transport.close()


def run(peers: Sequence[StorePeer], until: Callable[[], bool], limit_s: float = 60.0) -> None:
    """Drive replicas of this process until something is true."""
    by_name = {peer.name: peer for peer in peers}
    for peer in peers:
        peer.send = lambda to, message, sender=peer.name: by_name[to].peer.on_message(
            sender, decode_message(encode_message(message))
        )
    end_s = time.monotonic() + limit_s
    while not until():
        assert time.monotonic() < end_s, "it did not happen"
        for peer in peers:
            peer.turn()
        time.sleep(0.001)


def fetch(receiver: StorePeer, owner: StorePeer, keys: Sequence[BlockKey], *others: StorePeer) -> FetchDone:
    """The outcome of one fetch between replicas of this process."""
    before = len(receiver.fetched)
    receiver.exchange.fetch(owner.name, keys, time.monotonic())
    run([receiver, owner, *others], lambda: len(receiver.fetched) > before)
    return receiver.fetched[-1]


# ---- replicas in processes of their own -----------------------------------------------------------------

STATES = {
    "owner": ("offer", "send 0", "send 3", "done"),
    "receiver": ("accept", "take 0", "take 3", "released"),
}
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
"""Where a replica can be struck: at a message that reaches it, or at a chunk that it fills or takes."""


def peer_process(
    control: Connection, kv: str, tp: int, device: str = "cpu", environment: Mapping[str, str] | None = None
) -> None:
    """A replica whose messages and orders its parent process carries."""
    os.environ.update(environment or {})
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    parent, strike = ReplicaId("parent"), ["", 0]
    patience_s = {} if device == "cpu" else GPU_PATIENCE_S
    me = StorePeer(ReplicaId("child"), tp=tp, kv=kv, device=torch.device(device), **patience_s)

    def struck(state: str) -> None:
        if strike[0] == state:
            strike[0] = ""
            os.kill(os.getpid(), int(strike[1]))

    for transport in me.transports:
        transport.read_chunk = lambda index, _: struck(f"send {index}")
        transport.write_chunk = lambda index, _: struck(f"take {index}")
    me.send = lambda to, message: control.send(("message", encode_message(message)))
    control.send("ready")
    while True:
        me.turn()
        for done in me.fetched:
            control.send(("fetched", str(done.failure), me.holds(done.keys)))
        me.fetched.clear()
        while control.poll(0.001):
            match control.recv():
                case ("cache", keys):
                    me.cache(keys)
                case ("fetch", keys):
                    me.exchange.fetch(parent, keys, time.monotonic())
                case ("strike", state, number):
                    strike[:] = [state, number]
                case ("message", data):
                    message = decode_message(data)
                    struck(type(message).__name__.lower())
                    me.peer.on_message(parent, message)
                case ("check",):
                    me.check()
                    control.send(("used", me.pool.used))
