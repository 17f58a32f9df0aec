"""`Transport` over links: one to each peer and direction, bounded in number, every stream ended in time."""

from __future__ import annotations

import resource
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic

import torch
from torch._C._distributed_c10d import Store

from quire.kvstore.failures import Cause, TransferFailed
from quire.kvstore.groups import host_store
from quire.kvstore.links import InLink, Link, LinkConfig, OutLink, Site
from quire.kvstore.streams import Body, Stream
from quire.kvstore.transport import Endpoint, Sink, Source, Ticket
from quire.kvstore.watch import Watch


class _Table(Generic[Body]):
    """The links of one direction, by peer; the least recently used first."""

    def __init__(self, open_link: Callable[[Endpoint], Link[Body]], most: int) -> None:
        self._open: Callable[[Endpoint], Link[Body]] = open_link
        self._most = most
        self._links: OrderedDict[str, Link[Body]] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, peer: Endpoint, stream: Stream[Body]) -> Link[Body]:
        """Onto the peer's link. Raises TransferFailed if there is none and no other can make room."""
        with self._lock:
            link = self._links.get(peer.name)
            if link is None or not link.usable:
                self._make_room()
                link = self._links[peer.name] = self._open(peer)
            self._links.move_to_end(peer.name)
            link.put(stream)
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
    """The `Transport` of one shard's process."""

    def __init__(self, host: str, device: torch.device, config: LinkConfig | None = None) -> None:
        """`host`: the address at which peers reach this process, and the only one it listens at."""
        config = config or LinkConfig()
        _allow_descriptors(2 * config.max_links * _LINK_DESCRIPTORS)
        meeting = host_store(host, config.operation_timeout_s)
        self._meeting: Store | None = meeting
        self._endpoint = Endpoint(secrets.token_hex(8), host, meeting.port)
        here = Site(self._endpoint, device, config)
        self._out: _Table[Source] = _Table(lambda peer: OutLink(here, peer), config.max_links)
        self._in: _Table[Sink] = _Table(lambda peer: InLink(here, peer), config.max_links)
        self._watch, self._patience_s = Watch(), config.operation_timeout_s

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def send(self, peer: Endpoint, ticket: Ticket, source: Source, timeout_s: float) -> Future[None]:
        return self._start(self._out, peer, Stream(ticket, source, time.monotonic() + timeout_s))

    def receive(self, peer: Endpoint, ticket: Ticket, sink: Sink, timeout_s: float) -> Future[None]:
        stream = Stream(ticket, sink, time.monotonic() + timeout_s, settle=sink.settle)
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
        self._meeting = None  # it stops listening

    def _start(self, table: _Table[Body], peer: Endpoint, stream: Stream[Body]) -> Future[None]:
        try:
            link = table.put(peer, stream)
        except TransferFailed as error:
            stream.end(error)
        else:
            self._watch.at(stream.deadline_s, lambda: table.overdue(peer, link, stream))
        return stream.future


_LINK_DESCRIPTORS, _OTHER_DESCRIPTORS = 16, 512


def _allow_descriptors(wanted: int) -> None:
    """Raise this process's own limit, as far as it may: gloo ends a process that has none left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted + _OTHER_DESCRIPTORS:  # below 0: there is no limit
        most = wanted + _OTHER_DESCRIPTORS
        resource.setrlimit(resource.RLIMIT_NOFILE, (most if hard < 0 else min(most, hard), hard))
