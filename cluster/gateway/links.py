"""One gateway's stream to one replica: calls go up one by one, events come down a step at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeGuard

import grpc

from quire.cluster.gateway.prompts import Prompts, Tokenizers
from quire.kvstore.books.keys import KeySpace
from quire.protos.quire.v1 import engine_pb2, engine_pb2_grpc, inference_pb2
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.service import INTERNAL_CHANNEL, SECRET_METADATA
from quire.replicas.engine.wire import keys_from_proto, load_from_proto, model_from_proto
from quire.replicas.errors import ConfigError, ReplicaDied, Status
from quire.replicas.request import ModelInfo

Heard = Callable[[str, LoadReport, int], None]
"""Which replica, how busy it is, and up to which call on the link it knows of them."""


class Call:
    """One request on a link. Iterate its events; close it in any case."""

    def __init__(self, link: ReplicaLink, number: int) -> None:
        self.link = link
        self.number = number
        """On its link: counted up."""
        self._events: deque[engine_pb2.Event] = deque()
        self._arrived = asyncio.Event()
        self._over = False

    async def next(self) -> engine_pb2.Event:
        """The next event; the last one is a failure or a delta with usage.

        Deltas that wait already are made one: under load clients get fewer messages, not later tokens.
        """
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        event = self._events.popleft()
        while self._events and _continues(event, self._events[0]):
            _append(event.delta, self._events.popleft().delta)
        return event

    def cancel(self) -> None:
        """Asks the replica to end it; its last event still comes."""
        self.link.send(engine_pb2.GatewayMessage(cancel=engine_pb2.CancelCall(call=self.number)))

    def close(self) -> None:
        """Gives everything back, on the replica too if the last event has not come."""
        if not self._over:
            self._over = True
            self.cancel()
        self.link.forget(self.number)

    def feed(self, event: engine_pb2.Event) -> None:
        """For the link: an event has come."""
        self._over = event.HasField("failure") or event.delta.HasField("usage")
        self._events.append(event)
        self._arrived.set()


class ReplicaLink:
    """A connected replica. Made by `connect`; of no more use once `alive` is False."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        stream: Any,
        outbox: Outbox,
        hello: engine_pb2.Hello,
        prompts: Prompts,
        heard: Heard,
    ) -> None:
        self.prompts = prompts
        """Made for the replica's model."""
        self.replica_id: str = hello.replica_id
        self.peer_id: str = hello.peer_id
        self.model: inference_pb2.Model = hello.model
        self.info: ModelInfo = model_from_proto(hello.model)
        self.keys: KeySpace = keys_from_proto(hello.keys)
        self.fingerprint = self.keys.fingerprint.hex()
        """Of the model as it is served here: equal where answers are."""
        self.alive = True
        self._channel = channel
        self._stream = stream
        self._outbox = outbox
        self._calls: dict[int, Call] = {}
        self._queries: dict[int, asyncio.Future[inference_pb2.ReplicaStats]] = {}
        self._numbers = 0
        self._heard = heard
        self._reader = asyncio.create_task(self._read())

    @staticmethod
    async def connect(
        address: str, secret: str, timeout_s: float, tokenizers: Tokenizers, heard: Heard
    ) -> ReplicaLink:
        """`heard` is called with every report of the replica's load.

        Raises ReplicaDied if the replica at `address` (host:port) does not say hello in time, ConfigError if
        what it says can never be read.
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
            prompts = await tokenizers.of(first.hello.tokenizer, tokenizer)
            return ReplicaLink(channel, stream, outbox, first.hello, prompts, heard)
        except BaseException as error:  # also when the request that wanted the link is cancelled
            await channel.close()
            if _too_large(error):
                raise ConfigError(
                    f"the replica at {address} has a model or tokenizer too large for one message: "
                    f"{_reason(error)}"
                ) from error
            if isinstance(error, grpc.aio.AioRpcError | TimeoutError):
                raise ReplicaDied(f"the replica at {address} does not answer: {_reason(error)}") from error
            raise

    def reads_like(self, other: ReplicaLink) -> bool:
        """Whether what was made for the other replica's model may be sent to this one."""
        return self.prompts is other.prompts and self.model == other.model

    def submit(self, submit: engine_pb2.Submit) -> Call:
        """Sends a request; `submit.call` is set here. On a dead link the call fails at once."""
        self._numbers += 1
        submit.call = self._numbers
        call = self._calls[self._numbers] = Call(self, self._numbers)
        if self.alive:
            self.send(engine_pb2.GatewayMessage(submit=submit))
        else:
            call.feed(_lost(self._numbers, begun=False))
        return call

    def tell_place(self, name: str, *, held: bool) -> None:
        """Serve never learns that a gateway has died: the replica gives back what it held."""
        if name:
            self.send(engine_pb2.GatewayMessage(place=engine_pb2.Place(name=name, held=held)))

    async def stats(self) -> inference_pb2.ReplicaStats:
        """Raises ReplicaDied if the link ends before the answer."""
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
        if self.alive:
            self._outbox.put_nowait(message)

    def forget(self, number: int) -> None:
        """For a call: it wants no more events."""
        self._calls.pop(number, None)

    async def close(self) -> None:
        """Ends the stream; the replica cancels what was open on it."""
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
                elif (answer := self._queries.get(message.stats.query)) is not None and not answer.done():
                    answer.set_result(message.stats.stats)
        except grpc.aio.AioRpcError:
            pass  # the replica died or its machine is gone: what `_fail_all` tells every call
        finally:
            self._fail_all()

    def _hear(self, load: engine_pb2.Load) -> None:
        self._heard(self.replica_id, load_from_proto(load), load.seen_call)

    def _fail_all(self) -> None:
        self.alive = False
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
