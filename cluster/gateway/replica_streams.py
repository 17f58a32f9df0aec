"""A gateway's streams to all replicas: connected when Serve lists a replica, chosen among for each request.

`ReplicaSource` (Ray Serve, or a list in tests) only says which replicas there are. Requests, tokens and load
reports travel on the streams, and replicas themselves refuse what they cannot take.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeVar

from quire.cluster.gateway.replica_stream import ReplicaStream
from quire.cluster.gateway.tokenizer import Tokenizers
from quire.cluster.routing.replica_table import ReplicaTable, RoutedRequest
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import QuireError, ReplicaDied

_HANDSHAKE_TIMEOUT_S = 5.0
"""How long a replica may take to say hello, or to tell its stats."""
_MAX_CONNECTING = 16
_CONNECT_RETRY_S = 0.5
_RECONNECT_S = 5.0
"""Pause before connecting again to a replica that failed as dead: time for Serve to replace it."""


T = TypeVar("T")


class ReplicaSource(Protocol):
    """Says which replicas there are."""

    def follow(self, listed: Callable[[Mapping[str, str]], None]) -> None:
        """Call `listed` on this event loop with all running replicas (id to address), at each change."""

    def waiting(self) -> AbstractAsyncContextManager[None]:
        """While the context is held, a request waits for a replica: where none runs, one is started."""


class NoReplicaReady(ReplicaDied):
    """No replica could take the request in time."""

    retry_s = 5.0


class ReplicaStreams:
    """All streams of one gateway."""

    def __init__(
        self,
        source: ReplicaSource,
        *,
        secret: str,
        wait_s: float,
        table: ReplicaTable | None = None,
        tokenizers: Tokenizers | None = None,
        reconnect_s: float = _RECONNECT_S,
    ) -> None:
        """`wait_s`: how long a request may wait while no replica is ready."""
        self.table = table or ReplicaTable()
        self._source = source
        self._secret = secret
        self._wait_s = wait_s
        self._reconnect_s = reconnect_s
        self._tokenizers = tokenizers or Tokenizers()
        self._listed: Mapping[str, str] = {}
        self._streams: dict[str, ReplicaStream] = {}
        self._last_connected: ReplicaStream | None = None
        self._connect_error: QuireError | None = None
        self._connecting = asyncio.Semaphore(_MAX_CONNECTING)
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        source.follow(self._on_listed)

    @property
    def connected(self) -> int:
        """The number of replicas with a living stream. May be read from any thread."""
        return sum(stream.alive for stream in tuple(self._streams.values()))

    @asynccontextmanager
    async def take(
        self, token_ids: Sequence[int] = (), tenant: str = "", without: Collection[str] = ()
    ) -> AsyncIterator[tuple[ReplicaStream, RoutedRequest]]:
        """Choose the best replica for this prompt; the request counts there until the context ends.

        Raises NoReplicaReady if none is connected within `wait_s`.
        """
        request = RoutedRequest(token_ids, tenant)
        stream = await self._found(lambda: self._streams.get(self.table.choose(request, without) or ""))
        try:
            yield stream, request
        finally:
            self.table.ended(request)

    async def any_replica(self) -> ReplicaStream:
        """Return the stream that was connected last; it may have ended since.

        During an upgrade other replicas serve another model. Raises NoReplicaReady.
        """
        return await self._found(lambda: self._last_connected)

    def others(self, without: Collection[str]) -> bool:
        """Return whether a request may go to any replica besides these."""
        return bool(self.table.candidates(without))

    def all_same_model_as(self, stream: ReplicaStream) -> bool:
        """Return whether no connected replica serves another model than this one."""
        return all(other.same_model_as(stream) for other in self._streams.values())

    async def stats(self) -> list[inference_pb2.ReplicaStats]:
        """Return the stats of every replica that answers."""
        await self.any_replica()
        answers = await asyncio.gather(*map(_stats_of, self._streams.values()), return_exceptions=True)
        return [answer for answer in answers if isinstance(answer, inference_pb2.ReplicaStats)]

    async def close(self) -> None:
        """End all streams; the replicas cancel what is open on them."""
        self._on_listed({})
        keepers = list(self._keepers.values())
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def _on_listed(self, replicas: Mapping[str, str]) -> None:
        self._listed = replicas
        self._connect_error = None  # of a replica that may be gone
        self.table.listed(replicas)
        for replica_id in replicas:
            if replica_id not in self._keepers:
                self._keepers[replica_id] = asyncio.create_task(self._keep_connected(replica_id))
        self._wake()

    async def _keep_connected(self, replica_id: str) -> None:
        """Hold a stream to this replica as long as it is listed, and until the stream ends if it is not."""
        try:
            while (address := self._listed.get(replica_id)) is not None:
                try:
                    stream = await self._connect(replica_id, address)
                except QuireError as error:
                    self._connect_error = error
                    self._wake()
                    died = isinstance(error, ReplicaDied)
                    await asyncio.sleep(_CONNECT_RETRY_S if died else self._reconnect_s)
                    continue
                self._streams[replica_id] = self._last_connected = stream
                self._connect_error = None
                self._wake()
                try:
                    await stream.ended.wait()
                finally:
                    del self._streams[replica_id]
                    await stream.close()
                await asyncio.sleep(self._reconnect_s)
        finally:
            del self._keepers[replica_id]

    async def _connect(self, replica_id: str, address: str) -> ReplicaStream:
        async with self._connecting:
            return await ReplicaStream.connect(
                replica_id, address, self._secret, _HANDSHAKE_TIMEOUT_S, self._tokenizers, self.table
            )

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _found(self, find: Callable[[], T | None]) -> T:
        """Return what `find` finds, now or after a change. Raises NoReplicaReady or what no wait can mend."""
        if (what := find()) is not None:
            return what
        try:
            async with asyncio.timeout(self._wait_s), self._source.waiting():
                while (what := find()) is None:
                    error = self._connect_error
                    if error is not None and not isinstance(error, ReplicaDied) and not self._streams:
                        raise error
                    await self._changed.wait()
                return what
        except TimeoutError:
            reason = self._connect_error or "none is up; it may still be loading"
            raise NoReplicaReady(
                f"no replica was ready within {self._wait_s:g} s: {reason}; try again, or look at "
                "`serve status` and the replica's log"
            ) from None


async def _stats_of(stream: ReplicaStream) -> inference_pb2.ReplicaStats:
    stats = await asyncio.wait_for(stream.stats(), _HANDSHAKE_TIMEOUT_S)
    stats.fingerprint = stream.fingerprint
    return stats
