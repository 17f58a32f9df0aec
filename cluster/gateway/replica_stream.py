"""A gateway's stream to one replica: calls go up one by one, events come down a step at a time.

What the replica says of itself goes to the gateway's `ReplicaTable`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, TypeGuard

import grpc

from quire.cluster.gateway.tokenizer import ChatTokenizer, Tokenizers
from quire.cluster.routing.replica_table import ReplicaTable
from quire.kvstore.books.keys import KeySpace
from quire.protos.quire.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from quire.replicas.engine.service import INTERNAL_CHANNEL, SECRET_METADATA
from quire.replicas.engine.wire import keys_from_proto, load_from_proto, model_from_proto
from quire.replicas.errors import ConfigError, ReplicaDied, Status
from quire.replicas.request import ModelInfo


class Call:
    """A request on a stream. Read its events with `next`, and close it in any case."""

    def __init__(self, stream: ReplicaStream, number: int) -> None:
        self.number = number
        """Names the call on its stream; counted up, never used twice."""
        self._stream = stream
        self._events: deque[engine_pb2.Event] = deque()
        self._arrived = asyncio.Event()
        self._over = False

    async def next(self) -> engine_pb2.Event:
        """Return the next event; the last one is a failure or a delta with usage.

        Deltas that are already waiting are merged: under load clients get fewer messages, not later tokens.
        """
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        while self._events and _continues(event, self._events[0]):
            _append(event.delta, self._events.popleft().delta)
        return event

    def cancel(self) -> None:
        """Ask the replica to end the call; its last event still arrives."""
        self._stream.send(engine_pb2.GatewayMessage(cancel=engine_pb2.CancelCall(call=self.number)))

    def close(self) -> None:
        """Give everything back, on the replica too if the last event has not arrived."""
        if not self._over:
            self._over = True
            self.cancel()
        self._stream.forget(self.number)

    def feed(self, event: engine_pb2.Event) -> None:
        """Take an event that has arrived on the stream."""
        self._over = event.HasField("failure") or event.delta.HasField("usage")
        self._events.append(event)
        self._arrived.set()


class ReplicaStream:
    """The stream to a connected replica. Made by `connect`; useless once `alive` is False."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        stream: Any,
        outbox: Outbox,
        hello: engine_pb2.Hello,
        tokenizer: ChatTokenizer,
        table: ReplicaTable,
    ) -> None:
        self.tokenizer = tokenizer
        """The tokenizer of the replica's model."""
        self.replica_id: str = hello.replica_id
        self.peer_id: str = hello.peer_id
        self.model: inference_pb2.Model = hello.model
        self.info: ModelInfo = model_from_proto(hello.model)
        self.keys: KeySpace = keys_from_proto(hello.keys)
        self.fingerprint = self.keys.fingerprint.hex()
        """Identifies the model as it is served here: equal fingerprints give equal answers."""
        self.alive = True
        self.draining = False
        """Whether the replica refuses new requests because it is shutting down."""
        self.ended = asyncio.Event()
        """Set when the stream has ended, for whatever reason."""
        self._channel = channel
        self._stream = stream
        self._outbox = outbox
        self._calls: dict[int, Call] = {}
        self._queries: dict[int, asyncio.Future[inference_pb2.ReplicaStats]] = {}
        self._numbers = 0
        self._table = table
        table.connected(self.replica_id, self.keys, self.model.page_tokens)
        self._reader = asyncio.create_task(self._read())

    @staticmethod
    async def connect(
        replica_id: str,
        address: str,
        secret: str,
        timeout_s: float,
        tokenizers: Tokenizers,
        table: ReplicaTable,
    ) -> ReplicaStream:
        """Connect to this replica at `address` (host:port).

        Raises ReplicaDied if it is not there or does not say hello in time, ConfigError if its hello can
        never be read.
        """
        channel = grpc.aio.insecure_channel(address, options=INTERNAL_CHANNEL)
        outbox: Outbox = asyncio.Queue()
        stub, metadata = engine_pb2_grpc.EngineStub(channel), ((SECRET_METADATA, secret),)
        stream = stub.Connect(_drain(outbox), metadata=metadata)

        async def tokenizer() -> Mapping[str, bytes]:
            query = engine_pb2.TokenizerQuery()
            answer: engine_pb2.TokenizerFiles = await stub.GetTokenizer(
                query, timeout=timeout_s, metadata=metadata
            )
            return answer.files

        try:
            async with asyncio.timeout(timeout_s):
                first = await stream.read()
            if first is grpc.aio.EOF:
                raise ReplicaDied(f"the replica at {address} closed the stream before its hello")
            if first.hello.replica_id != replica_id:
                raise ReplicaDied(f"replica {replica_id} is gone: another one answers at {address}")
            chat_tokenizer = await tokenizers.of(first.hello.tokenizer, tokenizer)
            return ReplicaStream(channel, stream, outbox, first.hello, chat_tokenizer, table)
        except BaseException as error:  # also when the gateway ends meanwhile
            await channel.close()
            if _too_large(error):
                raise ConfigError(
                    f"the replica at {address} has a model or tokenizer too large for one message: "
                    f"{_reason(error)}"
                ) from error
            if isinstance(error, grpc.aio.AioRpcError | TimeoutError):
                raise ReplicaDied(f"the replica at {address} does not answer: {_reason(error)}") from error
            raise

    def same_model_as(self, other: ReplicaStream) -> bool:
        """Return whether what was tokenized for the other replica may be sent to this one."""
        return self.tokenizer is other.tokenizer and self.model == other.model

    def submit(self, submit: engine_pb2.Submit) -> Call:
        """Send a request and set its `call`. On a dead stream the call fails at once."""
        self._numbers += 1
        submit.call = self._numbers
        call = self._calls[self._numbers] = Call(self, self._numbers)
        if self.alive:
            self.send(engine_pb2.GatewayMessage(submit=submit))
        else:
            call.feed(_lost(self._numbers, begun=False))
        return call

    async def stats(self) -> inference_pb2.ReplicaStats:
        """Return the replica's stats. Raises ReplicaDied if the stream ends before the answer."""
        if not self.alive:
            raise ReplicaDied(f"replica {self.replica_id} is gone")
        self._numbers += 1
        query = self._numbers
        answer: asyncio.Future[inference_pb2.ReplicaStats] = asyncio.get_running_loop().create_future()
        self._queries[query] = answer
        self.send(engine_pb2.GatewayMessage(stats=engine_pb2.StatsQuery(query=query)))
        try:
            return await answer
        finally:
            del self._queries[query]

    def send(self, message: engine_pb2.GatewayMessage) -> None:
        """Queue a message for the replica; on a dead stream nothing happens."""
        if self.alive:
            self._outbox.put_nowait(message)

    def forget(self, number: int) -> None:
        """Deliver no more events to this call."""
        self._calls.pop(number, None)

    async def report_dead(self) -> None:
        """End the stream because the replica failed a request as dead, unless it is only shutting down.

        All requests there then go elsewhere at once, and no new one comes.
        """
        if not self.draining:
            await self.close()

    async def close(self) -> None:
        """End the stream; the replica cancels what was open on it."""
        self._reader.cancel()
        self._stream.cancel()
        self._fail_all()
        await self._channel.close()

    async def _read(self) -> None:
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                if message.HasField("step"):
                    for event in message.step.events:
                        if (call := self._calls.get(event.call)) is not None:
                            call.feed(event)
                    if message.step.HasField("load"):
                        self._hear(message.step.load)
                elif message.HasField("load"):
                    self._hear(message.load)
                elif message.HasField("draining"):
                    self.draining = True
                    self._table.draining(self.replica_id)
                elif (answer := self._queries.get(message.stats.query)) is not None and not answer.done():
                    answer.set_result(message.stats.stats)
        except grpc.aio.AioRpcError:
            pass  # the replica died or its machine is gone: what `_fail_all` tells every call
        finally:
            self._fail_all()

    def _hear(self, load: engine_pb2.Load) -> None:
        self._table.heard(self.replica_id, load_from_proto(load), load.seen_call)

    def _fail_all(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._table.disconnected(self.replica_id)
        self.ended.set()
        for number, call in self._calls.items():
            call.feed(_lost(number, begun=True))
        self._calls.clear()
        for answer in self._queries.values():
            if not answer.done():
                answer.set_exception(ReplicaDied(f"replica {self.replica_id} is gone"))


Outbox = asyncio.Queue[engine_pb2.GatewayMessage]


async def _drain(outbox: Outbox) -> AsyncIterator[engine_pb2.GatewayMessage]:
    while True:
        yield await outbox.get()


def _continues(event: engine_pb2.Event, following: engine_pb2.Event) -> bool:
    """Whether both are deltas of the same output."""
    return (
        event.HasField("delta")
        and following.HasField("delta")
        and event.delta.index == following.delta.index
        and not event.delta.finish_reason
    )


def _append(delta: inference_pb2.Delta, more: inference_pb2.Delta) -> None:
    text = delta.text + more.text
    delta.MergeFrom(more)  # appends what is repeated, replaces what is not
    delta.text = text


def _lost(number: int, *, begun: bool) -> engine_pb2.Event:
    """`begun`: whether it may have been computed there when the replica died."""
    message = "the replica serving this request died; try again"
    failure = engine_pb2.Failure(status=Status.UNAVAILABLE, message=message, begun=begun)
    return engine_pb2.Event(call=number, failure=failure)


def _reason(error: grpc.aio.AioRpcError | TimeoutError) -> str:
    return f"{error.details()}" if isinstance(error, grpc.aio.AioRpcError) else "no hello in time"


def _too_large(error: BaseException) -> TypeGuard[grpc.aio.AioRpcError]:
    """Before its hello nothing else of a replica's is exhausted, so another try would end like this one."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
