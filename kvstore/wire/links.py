"""What all kinds of links share: one thread per peer and direction that moves streams one after another, a
bounded table of them, and the `Transport` that is made of two such tables.

How bytes travel is in `tcp.py` (CPUs) and `nccl.py` (GPUs).
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic

import torch

from quire.kvstore.wire.failures import Cause, TransferFailed
from quire.kvstore.wire.groups import reason_of
from quire.kvstore.wire.streams import Body, Stream
from quire.kvstore.wire.threads import use_batch_scheduling
from quire.kvstore.wire.transport import Endpoint, Sink, Source, Ticket
from quire.kvstore.wire.watch import Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConfig:
    """How links behave; the same on all replicas of a deployment."""

    operation_timeout_s: float = 1.0
    """A peer that lets a chunk wait longer is given up."""
    max_links: int = 64
    """Links of each direction; the one that was idle longest makes room."""
    depth: int = 3
    """Chunks under way at once between GPUs, each in memory of the link."""

    def __post_init__(self) -> None:
        if self.operation_timeout_s <= 0 or min(self.max_links, self.depth) < 1:
            raise ValueError(f"all numbers of a LinkConfig are positive, got {self}")

    @staticmethod
    def on(device: torch.device) -> LinkConfig:
        """On a GPU a link takes about a third of a gigabyte of its memory, and over a second to connect."""
        return LinkConfig(operation_timeout_s=3.0, max_links=4) if device.type == "cuda" else LinkConfig()


@dataclass(frozen=True)
class Site:
    """What all links of a transport share."""

    endpoint: Endpoint
    device: torch.device
    config: LinkConfig


class Link(ABC, Generic[Body]):
    """One end of a link: a queue of streams, and the thread that moves them."""

    def __init__(self, here: Site, peer: Endpoint) -> None:
        self._here, self._peer, self._patience_s = here, peer, here.config.operation_timeout_s
        self._waiting: OrderedDict[Ticket, Stream[Body]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False
        self._current: Stream[Body] | None = None
        self._thread = threading.Thread(target=self._run, name=f"quire-link-{peer.name}", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._current is None and not self._waiting

    @property
    def usable(self) -> bool:
        return not self._closed and self._thread.is_alive()

    def put(self, stream: Stream[Body]) -> None:
        with self._changed:
            self._waiting[stream.ticket] = stream
            self._changed.notify_all()

    def overdue(self, stream: Stream[Body]) -> bool:
        """The stream's time is up. Returns whether the thread may hang in it, so that the link is lost."""
        with self._changed:
            self._waiting.pop(stream.ticket, None)
            return False

    def stop(self) -> None:
        """The thread ends as soon as it looks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self, error: TransferFailed) -> None:
        """Fail all streams. Does not wait for the thread, which may hang in a call until its peer is gone."""
        self.stop()
        with self._changed:
            left = [*self._waiting.values(), *([self._current] if self._current else [])]
            self._waiting.clear()
        for stream in left:
            stream.end(error)

    def join(self, until_s: float) -> None:
        """Wait for the thread of a closed link, unless it hangs."""
        self._thread.join(max(until_s - time.monotonic(), 0.0))

    @abstractmethod
    def _next(self) -> Stream[Body] | None:
        """Wait for the next stream, which becomes the current one; None when there was none for a while."""

    @abstractmethod
    def _move(self, stream: Stream[Body]) -> None:
        """All its chunks."""

    @abstractmethod
    def _drop(self) -> None:
        """Give up the connection to the peer: nothing that is still under way in it is wanted any more."""

    def _take_first(self) -> Stream[Body] | None:
        """Wait for a stream and make the one that came first the current one; None if the link was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            _, self._current = self._waiting.popitem(last=False)
            return self._current

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._drop)
            if self._here.device.type == "cuda":  # beside the steps, not between them
                stack.enter_context(torch.cuda.device(self._here.device))
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(self._here.device)))
            else:
                use_batch_scheduling()
            while not self._closed:
                self._turn()

    def _turn(self) -> None:
        try:
            stream = self._next()
            if stream is not None:
                self._move(stream)
                stream.end()
        except TransferFailed as error:
            self._give_up(error)
        except (RuntimeError, OSError) as error:  # torch's own, and the sockets'
            self._give_up(TransferFailed(Cause.PEER, f"{self._peer.host}: {reason_of(error)}"))
        finally:
            self._current = None

    def _give_up(self, error: TransferFailed) -> None:
        self._drop()
        if self._current is not None:
            self._current.end(error)

    def _check(self, stream: Stream[Body]) -> None:
        stream.check()
        if self._closed:
            raise TransferFailed(Cause.CLOSED, "the link was closed")


class LinkTable(Generic[Body]):
    """The links of one direction, by peer; the least recently used first."""

    def __init__(self, open_link: Callable[[Endpoint], Link[Body]], most: int) -> None:
        self._open: Callable[[Endpoint], Link[Body]] = open_link
        self._most = most
        self._links: OrderedDict[str, Link[Body]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, peer: Endpoint, stream: Stream[Body]) -> Link[Body]:
        """Onto the peer's link. Raises TransferFailed if there is none and no other can make room."""
        with self._lock:
            link = self._of(peer)
            link.put(stream)
            return link

    def link(self, peer: Endpoint) -> Link[Body]:
        """The peer's link, opened if need be. Raises TransferFailed likewise."""
        with self._lock:
            return self._of(peer)

    def _of(self, peer: Endpoint) -> Link[Body]:
        link = self._links.get(peer.name)
        if link is None or not link.usable:
            self._make_room()
            link = self._links[peer.name] = self._open(peer)
        self._links.move_to_end(peer.name)
        return link

    def overdue(self, peer: Endpoint, link: Link[Body], stream: Stream[Body]) -> None:
        """Ends the stream, and its link with it if that hangs: the next stream gets another one."""
        hangs = link.overdue(stream)
        stream.end(
            TransferFailed(Cause.DEADLINE, f"{peer.host}: stream {stream.ticket} was not done in time")
        )
        if hangs:
            with self._lock:
                if self._links.get(peer.name) is link:
                    del self._links[peer.name]
            link.close(TransferFailed(Cause.PEER, f"{peer.host}: the link hung and was given up"))

    def clear(self) -> list[Link[Body]]:
        """All links, none of which begins another stream."""
        with self._lock:
            links = list(self._links.values())
            self._links.clear()
        for link in links:
            link.stop()
        return links

    def _make_room(self) -> None:
        if len(self._links) < self._most:
            return
        for name, link in self._links.items():
            if link.idle or not link.usable:
                del self._links[name]
                link.close(TransferFailed(Cause.CLOSED, "the link made room for another one"))
                return
        raise TransferFailed(Cause.BUSY, f"all {self._most} links are in use; raise max_links to allow more")


class LinkTransport:
    """The `Transport` of one shard's process, over links of one kind."""

    def __init__(
        self,
        here: Site,
        open_out: Callable[[Site, Endpoint], Link[Source]],
        open_in: Callable[[Site, Endpoint], Link[Sink]],
    ) -> None:
        self._endpoint, config = here.endpoint, here.config
        self._out: LinkTable[Source] = LinkTable(lambda peer: open_out(here, peer), config.max_links)
        self._in: LinkTable[Sink] = LinkTable(lambda peer: open_in(here, peer), config.max_links)
        self._watch, self._patience_s = Watch(), config.operation_timeout_s

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Future[None]:
        return self._start(self._out, peer, Stream(ticket, source, time.monotonic() + timeout_s))

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Future[None]:
        stream = Stream(ticket, sink, time.monotonic() + timeout_s, synchronize=sink.synchronize)
        return self._start(self._in, peer, stream)

    def close(self) -> None:
        self._watch.close()
        links: list[Link[Any]] = [*self._out.clear(), *self._in.clear()]
        for link in links:
            link.close(TransferFailed(Cause.CLOSED, "the transport was closed"))
        # A thread that is inside torch when the interpreter ends takes the process down with an abort.
        until_s = time.monotonic() + self._patience_s
        for link in links:
            link.join(until_s)

    def _start(self, table: LinkTable[Body], peer: Endpoint, stream: Stream[Body]) -> Future[None]:
        try:
            link = table.put(peer, stream)
        except TransferFailed as error:
            stream.end(error)
        else:
            self._watch.at(stream.deadline_s, lambda: table.overdue(peer, link, stream))
        return stream.future
