"""Links between GPUs: one-way groups of two, opened on demand.

A link leads from one sender to one receiver. They meet in the receiver's store, under the sender's name:

    generation        counts the link's groups: a group that saw an error is never used again
    starts            queue of "<ticket> <generation> <digest>": what the sender sends next, in which group,
                      and in chunks of what sizes, which both ends have to agree on
    dropped/<g>       the receiver has given up group g: the sender opens another one

Any error or deadline drops the group and fails the stream; the next stream opens the next generation.
"""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from collections import deque
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.groups import Pair, host_store, join_store
from quire.kvstore.wire.links import Link, LinkConfig, LinkTransport, Site
from quire.kvstore.wire.streams import Body, Stream
from quire.kvstore.wire.transport import Endpoint, Sink, Source, Ticket

_SOON_S, _LOOK_S = 0.0002, 0.01
"""How long a receiver waits between two looks at what its peer has started: at first, and at most."""


class NcclTransport(LinkTransport):
    """The `Transport` of a shard whose pool is on a GPU."""

    def __init__(self, host: str, device: torch.device, config: LinkConfig | None = None) -> None:
        """`host`: the address at which peers reach this process, and the only one it listens at."""
        config = config or LinkConfig()
        meeting = host_store(host, config.operation_timeout_s)
        self._meeting: Store | None = meeting
        endpoint = Endpoint(secrets.token_hex(8), host, meeting.port)
        super().__init__(Site(endpoint, device, config), _OutLink, _InLink)

    def close(self) -> None:
        super().close()
        self._meeting = None  # it stops listening


class _PairLink(Link[Body]):
    """One end of a link."""

    def __init__(self, here: Site, peer: Endpoint) -> None:
        self._store: Store | None = None
        self._pair: Pair | None = None
        self._generation = 0
        self._memory: dict[int, Tensor] = {}
        super().__init__(here, peer)

    def overdue(self, stream: Stream[Body]) -> bool:
        """No other stream begins on a link whose thread is still with this one, whatever it does."""
        with self._changed:
            self._waiting.pop(stream.ticket, None)
            hangs = self._current is stream
            self._closed |= hangs
            return hangs

    def _meeting(self, receiver: Endpoint, sender: Endpoint) -> Store:
        """The part of the receiver's store that belongs to the link; a connection of its own."""
        address = (receiver.host, receiver.port)
        try:
            # A refusal would cost the store a second.
            socket.create_connection(address, self._patience_s).close()
        except OSError as error:
            raise TransferFailed(Cause.PEER, f"{receiver.host}:{receiver.port}: {error.strerror}") from error
        return PrefixStore(f"link/{sender.name}", join_store(*address, self._patience_s))

    def _drop_pair(self) -> None:
        """The link's memory goes with it: what is still under way may write there, and nowhere else."""
        if self._pair is not None:
            self._pair.drop()
            self._pair, self._memory = None, {}

    def _connect(self, store: Store, generation: int, rank: int) -> None:
        self._generation = generation
        self._pair = Pair(
            PrefixStore(str(generation), store),
            rank=rank,
            device=self._here.device,
            timeout_s=self._patience_s,
        )

    def _wait(self, stream: Stream[Body], pair: Pair, work: dist.Work) -> None:
        """For a chunk; never past the stream's deadline."""
        try:
            pair.wait(work, min(self._patience_s, stream.deadline_s - time.monotonic()))
        except RuntimeError:
            self._check(stream)
            raise

    def _buffer(self, body: Body, index: int) -> Tensor:
        """Memory of the link: each chunk that is under way has its own."""
        slot, size = index % self._here.config.depth, body.sizes[index]
        if slot not in self._memory or self._memory[slot].numel() < size:
            self._memory[slot] = torch.empty(size, dtype=torch.uint8, device=self._here.device)
        return self._memory[slot][:size]


class _OutLink(_PairLink[Source]):
    """The sender's end."""

    def _next(self) -> Stream[Source] | None:
        stream = self._take_first()
        if stream is None or stream.ended:
            return None
        if self._was_dropped():
            self._drop_pair()
        if self._store is None:
            self._drop_pair()
            self._store = self._meeting(self._peer, self._here.endpoint)
        fresh = self._pair is None
        if fresh:
            self._generation = self._store.add("generation", 1)
            self._store.delete_key(f"dropped/{self._generation - 1}")  # what that left behind
        if stream.ended:  # the store's answers came too late: another link may have taken over
            self._drop()
            return None
        self._store.queue_push("starts", f"{stream.ticket} {self._generation} {_digest(stream.body.sizes)}")
        if fresh:
            self._connect(self._store, self._generation, 0)
        return stream

    def _was_dropped(self) -> bool:
        """By the receiver. A connection that was reset while the link was idle is given up."""
        try:
            return self._store is not None and self._store.check([f"dropped/{self._generation}"])
        except RuntimeError:
            self._store = None
            return False

    def _move(self, stream: Stream[Source]) -> None:
        assert self._pair is not None
        pair, body, under_way = self._pair, stream.body, deque[dist.Work]()
        for index in range(len(body.sizes)):
            if len(under_way) == self._here.config.depth:
                self._wait(stream, pair, under_way.popleft())
            self._check(stream)
            chunk = body.read_chunk(index, self._buffer(body, index))
            under_way.append(pair.post(chunk, index))
        while under_way:
            self._wait(stream, pair, under_way.popleft())

    def _drop(self) -> None:
        self._drop_pair()
        self._store = None  # its connection may be the one that broke


class _InLink(_PairLink[Sink]):
    """The receiver's end. It follows the order in which the sender starts."""

    def _next(self) -> Stream[Sink] | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
        if self._closed:
            return None
        start = self._start()
        if start is None:
            return None
        ticket, generation, sizes = start
        if generation < self._generation:  # from a thread that the sender had given up
            self._put_back()
            return None
        if generation != self._generation:
            self._drop_pair()
            self._meet().delete_key(f"dropped/{self._generation}")
            self._generation = generation
        if self._current is None:
            raise TransferFailed(Cause.DEADLINE, f"stream {ticket} came when nobody waited for it any more")
        if sizes != _digest(self._current.body.sizes):
            raise TransferFailed(Cause.HEADER, f"stream {ticket} has other chunks than were agreed")
        if self._pair is None:
            self._connect(self._meet(), generation, 1)
        return self._current

    def _start(self) -> tuple[Ticket, int, str] | None:
        """What the sender sends now: ticket, generation, sizes. Its stream, if any, becomes the current one.

        A sender may be faster than the message that announces it, so that its stream is waited for; but
        where it has started another one since, the first is over.
        """
        start = self._wait_for_start()
        if start is None:
            return None
        end_s = time.monotonic() + self._patience_s / 2
        while True:
            while (newer := self._pop()) is not None:
                start = newer
            ticket, generation, sizes = start.decode().split()
            if self._begin(Ticket(int(ticket))) or self._closed or time.monotonic() > end_s:
                return Ticket(int(ticket)), int(generation), sizes

    def _wait_for_start(self) -> bytes | None:
        """The next start, as long as a stream waits for one. Asks often at first, then less."""
        pause_s = _SOON_S
        while not self._closed:
            if (start := self._pop()) is not None:
                return start
            with self._changed:
                if not self._waiting:
                    break
                self._changed.wait(pause_s)
            pause_s = min(1.5 * pause_s, _LOOK_S)
        return None

    def _pop(self) -> bytes | None:
        """The next start, if there is one. A connection that was reset, mostly while idle, is given up."""
        try:
            return self._meet().queue_pop("starts", block=False)
        except dist.QueueEmptyError:
            return None
        except RuntimeError:
            self._store = None
            return None

    def _meet(self) -> Store:
        if self._store is None:
            self._store = self._meeting(self._here.endpoint, self._peer)
        return self._store

    def _put_back(self) -> None:
        with self._changed:
            if self._current is not None and not self._current.ended:
                self._waiting[self._current.ticket] = self._current
            self._current = None

    def _begin(self, ticket: Ticket) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: ticket in self._waiting or self._closed, _LOOK_S)
            self._current = self._waiting.pop(ticket, None)
            return self._current is not None

    def _move(self, stream: Stream[Sink]) -> None:
        assert self._pair is not None
        pair, body, depth = self._pair, stream.body, self._here.config.depth
        arriving = deque[dist.Work]()

        def post(index: int) -> None:
            if index < len(body.sizes):
                arriving.append(pair.post(self._buffer(body, index), index))

        self._check(stream)
        for index in range(depth):
            post(index)
        for index in range(len(body.sizes)):
            self._wait(stream, pair, arriving.popleft())
            with stream.lock:
                self._check(stream)
                body.write_chunk(index, self._buffer(body, index))
            post(index + depth)
        body.verify()

    def _drop(self) -> None:
        if self._store is not None:
            with suppress(RuntimeError):  # our own store: where it is gone, so is the transport
                self._store.set(f"dropped/{self._generation}", "")
        self._drop_pair()


def _digest(sizes: tuple[int, ...]) -> str:
    return hashlib.blake2b(repr(sizes).encode(), digest_size=8).hexdigest()
