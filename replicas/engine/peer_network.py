"""The way to the other replicas of a deployment: Engine services by gRPC, the directory in the background.

Knows no Ray: the directory is whatever can be announced to and asked. A replica's id
ends in the address of its Engine service, so that any replica that knows the id can reach it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import grpc

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.announcer import Announcer, ChannelLost
from quire.kvstore.peers.directory import Announcement, Holder
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message, encode_message
from quire.protos.quire.v1 import engine_pb2, engine_pb2_grpc
from quire.replicas.engine.service import INTERNAL_CHANNEL, SECRET_METADATA

_SEND_TIMEOUT_S = 2.0
_MAX_CHANNELS = 64
_MAX_LOOKUPS = 256
_LOOKUP_STALE_S = 1.0
"""A lookup that was asked for this long ago is of no use any more."""

log = logging.getLogger(__name__)


def peer_name(address: str) -> ReplicaId:
    """A new name for the replica that answers at `address`, host:port: one incarnation, never used again."""
    return ReplicaId(f"{secrets.token_hex(8)}@{address}")


class DirectoryAccess(Protocol):
    """The directory, wherever it is. All may block, and raise ChannelLost."""

    def announce(self, said: Announcement) -> bool: ...
    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]: ...
    def owners(self) -> tuple[ReplicaId, ...]: ...


class GrpcPeers:
    """The `PeerNetwork` of one replica."""

    def __init__(self, me: ReplicaId, secret: str, directory: DirectoryAccess) -> None:
        """Begins to announce. `secret`: what Engine services of this deployment ask for."""
        self._me, self._metadata = me, ((SECRET_METADATA, secret),)
        self._directory = directory
        self._announcer = Announcer(me, directory)
        self._announcer.start()
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix="quire-lookup")
        self._queued = 0
        self._closed = False
        self._channels: OrderedDict[str, grpc.Channel] = OrderedDict()
        self._lock = threading.Lock()

    def send(self, to: ReplicaId, message: Message, failed: Callable[[], None]) -> None:
        """Deliver a message. A later replica at the same address refuses it, which is a failure, too."""
        if self._closed:
            failed()
            return
        request = engine_pb2.PeerMessage(to=to, sender=self._me, message=encode_message(message))
        call = engine_pb2_grpc.EngineStub(self._channel(to.rpartition("@")[2])).Deliver.future(
            request, timeout=_SEND_TIMEOUT_S, metadata=self._metadata
        )
        call.add_done_callback(partial(_delivered, to, failed))

    def lookup(self, chain: Sequence[BlockKey], answer: Callable[[tuple[Holder, ...]], None]) -> None:
        """Look a chain up in the background. A lookup in a queue too long, or for too long, finds nothing."""
        with self._lock:
            full = self._closed or self._queued >= _MAX_LOOKUPS
            self._queued += not full
        if full:
            answer(())
        else:
            self._lookups.submit(self._look, tuple(chain), answer, time.monotonic())

    def others(self) -> tuple[ReplicaId, ...]:
        """Ask the directory which replicas live, and wait for its answer; none if it does not answer."""
        try:
            return tuple(owner for owner in self._directory.owners() if owner != self._me)
        except ChannelLost as error:
            log.warning("the directory does not answer, nothing is handed over: %s", error)
            return ()

    def added(self, keys: Sequence[BlockKey]) -> None:
        self._announcer.added(keys)

    def removed(self, keys: Sequence[BlockKey]) -> None:
        self._announcer.removed(keys)

    def close(self) -> None:
        """Stop announcing, and reach no replica any more."""
        self._closed = True
        self._announcer.close()
        self._lookups.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()

    def _look(
        self, chain: tuple[BlockKey, ...], answer: Callable[[tuple[Holder, ...]], None], asked_s: float
    ) -> None:
        with self._lock:
            self._queued -= 1
        holders: tuple[Holder, ...] = ()
        try:
            if time.monotonic() - asked_s < _LOOKUP_STALE_S:
                holders = self._directory.lookup(chain)
        except ChannelLost as error:
            log.warning("the directory does not answer, blocks are computed: %s", error)
        answer(tuple(holder for holder in holders if holder.owner != self._me))

    def _channel(self, address: str) -> grpc.Channel:
        """Return the channel to this address; the least recently used one makes room."""
        with self._lock:
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = grpc.insecure_channel(address, INTERNAL_CHANNEL)
                if len(self._channels) > _MAX_CHANNELS:
                    self._channels.popitem(last=False)[1].close()
            self._channels.move_to_end(address)
            return channel


def _delivered(to: ReplicaId, failed: Callable[[], None], call: Future[engine_pb2.PeerAck]) -> None:
    if call.exception() is not None:
        log.info("%s was not reached: %s", to, call.exception())
        failed()
