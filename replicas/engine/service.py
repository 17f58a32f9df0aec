"""The `quire.v1.Engine` service: the streams of many gateways over one engine. Knows no Ray.

When a stream ends, for whatever reason, its requests are cancelled. A replica that shuts down drains itself:
it refuses new requests and lets the open ones end.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import grpc

from quire.kvstore.books.keys import KeySpace
from quire.kvstore.peers.ids import ReplicaId
from quire.kvstore.peers.messages import Message, decode_message
from quire.protos.quire.v1 import engine_pb2, engine_pb2_grpc
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.wire import (
    keys_to_proto,
    load_to_proto,
    model_to_proto,
    request_from_proto,
    stats_to_proto,
    write_event,
)
from quire.replicas.errors import QuireError, ReplicaDied, Status
from quire.replicas.request import Event, Failure, ModelInfo, Output, Request, RequestId
from quire.replicas.stats import EngineStats
from quire.replicas.text.tokenizer_files import digest_of

SECRET_METADATA = "quire-secret"
INTERNAL_CHANNEL = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    # A peer whose machine is gone sends no FIN: pings find it, which gRPC's own threads answer.
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 4_000),  # without it a stopped process is waited for a minute
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),  # more often would be taken for an attack
)
"""Options of both ends of the stream between a gateway and a replica."""
_LOAD_INTERVAL_S = 0.25
"""Period at which a gateway that gets no steps is sent the replica's load, if it has changed."""
_LOAD_HEARTBEAT_S = 1.0
"""Period at which it is sent the load in any case: a gateway ignores older reports."""
_DRAINING = engine_pb2.ReplicaMessage(draining=engine_pb2.Draining())
_UNSAYABLE = "the replica cannot read this request or say its answer; the others go on"

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the service needs of `AsyncEngine`."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def keys(self) -> KeySpace: ...
    @property
    def load(self) -> LoadReport: ...

    def start(self, deliver: Callable[[tuple[Event, ...]], None]) -> None: ...
    def submit(self, request: Request) -> None: ...
    def on_peer_message(self, sender: ReplicaId, message: Message) -> None: ...
    def cancel(self, request_id: RequestId) -> None: ...
    def stats(self) -> EngineStats: ...


@dataclass(slots=True, eq=False)
class _GatewayStream:
    """One gateway's stream: its open requests and the messages that wait to be sent on it."""

    number: int
    open: dict[int, RequestId] = field(default_factory=dict)
    outbox: list[engine_pb2.ReplicaMessage] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    unreported_calls: deque[tuple[int, int]] = field(default_factory=deque)
    """Calls that no load report has counted yet: (requests that the replica was sent up to it, call)."""
    seen_call: int = 0
    last_load_sent: LoadReport | None = None
    last_load_sent_s: float = 0.0

    def post(self, message: engine_pb2.ReplicaMessage) -> None:
        self.outbox.append(message)
        self.wake.set()

    def post_event(self, call: int, event: Event) -> None:
        """Add to the step that is waiting already: a slow gateway gets fewer and larger messages."""
        large = isinstance(event, Output) and event.prompt_logprobs
        if large or not self.outbox or self.outbox[-1].WhichOneof("message") != "step":
            self.post(engine_pb2.ReplicaMessage(step=engine_pb2.Step()))
        events = self.outbox[-1].step.events
        try:
            write_event(events.add(), call, event)
        except Exception:
            del events[-1]  # half an event
            raise


class EngineService(engine_pb2_grpc.EngineServicer):
    """Runs on the event loop that creates it; the engine's thread only hands over whole steps."""

    def __init__(
        self,
        engine: Engine,
        *,
        secret: str,
        replica_id: str,
        tokenizer: Mapping[str, bytes] = MappingProxyType({}),
        peer_id: ReplicaId | None = None,
    ) -> None:
        """Start the engine. `secret` is what gateways and other replicas must show; `peer_id` is how the
        latter call this one, None where it shares nothing. `tokenizer`: its files, by name.
        """
        self._tokenizer = engine_pb2.TokenizerFiles(files=tokenizer)
        self._tokenizer_digest = digest_of(tokenizer)
        self._engine = engine
        self._peer_id = peer_id
        self._secret = secret.encode()
        self._replica_id = replica_id
        self._started_s = time.monotonic()
        self._connected = 0
        self._streams: set[_GatewayStream] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._submitted = 0
        self._owners: dict[RequestId, tuple[_GatewayStream, int]] = {}
        self._loop = asyncio.get_running_loop()
        engine.start(self._from_engine_thread)

    async def Connect(
        self, requests: AsyncIterator[engine_pb2.GatewayMessage], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[engine_pb2.ReplicaMessage]:
        await self._authenticate(context)
        self._connected += 1
        stream = _GatewayStream(self._connected)
        self._streams.add(stream)
        reader = asyncio.create_task(self._read(stream, requests))
        try:
            hello = engine_pb2.Hello(
                model=model_to_proto(self._engine.info),
                replica_id=self._replica_id,
                peer_id=self._peer_id or "",
                keys=keys_to_proto(self._engine.keys),
                tokenizer=self._tokenizer_digest,
            )
            yield engine_pb2.ReplicaMessage(hello=hello)
            if self._draining:
                yield _DRAINING
            while not stream.ended:
                self._tell_load(stream)
                outbox, stream.outbox = stream.outbox, []
                for message in outbox:
                    yield message
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LOAD_INTERVAL_S):
                        await stream.wake.wait()
                stream.wake.clear()
        finally:  # also on CancelledError and GeneratorExit: both happen when a gateway goes
            reader.cancel()
            self._streams.discard(stream)
            stream.ended = True
            for request_id in stream.open.values():
                self._engine.cancel(request_id)

    async def drain(self) -> None:
        """Refuse new requests from now on; return when all open ones have ended."""
        self._draining = True
        for stream in self._streams:
            stream.post(_DRAINING)
        await self._idle.wait()

    async def Deliver(
        self, request: engine_pb2.PeerMessage, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.PeerAck:
        await self._authenticate(context)
        if request.to != self._peer_id:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.to} is not here (any more)")
        try:
            message = decode_message(request.message)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        try:
            self._engine.on_peer_message(ReplicaId(request.sender), message)
        except ReplicaDied as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        return engine_pb2.PeerAck()

    async def GetTokenizer(
        self, request: engine_pb2.TokenizerQuery, context: grpc.aio.ServicerContext[Any, Any]
    ) -> engine_pb2.TokenizerFiles:
        await self._authenticate(context)
        return self._tokenizer

    async def _authenticate(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        shown = dict(context.invocation_metadata() or ()).get(SECRET_METADATA, "")
        if not hmac.compare_digest(str(shown).encode(), self._secret):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"metadata {SECRET_METADATA!r} is missing or not this application's secret; "
                "only gateways and replicas of the same deployment may connect",
            )

    async def _read(self, stream: _GatewayStream, requests: AsyncIterator[engine_pb2.GatewayMessage]) -> None:
        try:
            async for message in requests:
                match message.WhichOneof("message"):
                    case "submit":
                        self._submit(stream, message.submit)
                    case "cancel" if message.cancel.call in stream.open:
                        self._engine.cancel(stream.open[message.cancel.call])
                    case "stats":
                        stream.post(self._stats(message.stats.query))
        finally:
            stream.ended = True
            stream.wake.set()

    def _submit(self, stream: _GatewayStream, submit: engine_pb2.Submit) -> None:
        request_id = RequestId(f"{stream.number}.{submit.call}")
        self._owners[request_id] = (stream, submit.call)
        self._idle.clear()
        stream.open[submit.call] = request_id
        with self._alone(request_id):
            if self._draining:
                raise ReplicaDied("the replica is shutting down; try again")
            self._engine.submit(request_from_proto(submit, request_id))
            self._submitted += 1
            stream.unreported_calls.append((self._submitted, submit.call))

    def _tell_load(self, stream: _GatewayStream) -> None:
        """Send the load with the step that goes out anyway, or alone."""
        load, now_s = self._engine.load, time.monotonic()
        if load == stream.last_load_sent and now_s - stream.last_load_sent_s < _LOAD_HEARTBEAT_S:
            return
        stream.last_load_sent, stream.last_load_sent_s = load, now_s
        while stream.unreported_calls and stream.unreported_calls[0][0] <= load.taken:
            stream.seen_call = stream.unreported_calls.popleft()[1]
        said = load_to_proto(load, stream.seen_call)
        if stream.outbox and stream.outbox[-1].WhichOneof("message") == "step":
            stream.outbox[-1].step.load.CopyFrom(said)
        else:
            stream.outbox.append(engine_pb2.ReplicaMessage(load=said))

    def _stats(self, query: int) -> engine_pb2.ReplicaMessage:
        uptime_s = time.monotonic() - self._started_s
        stats = stats_to_proto(self._engine.stats(), self._replica_id, uptime_s)
        return engine_pb2.ReplicaMessage(stats=engine_pb2.StatsAnswer(query=query, stats=stats))

    def _from_engine_thread(self, events: tuple[Event, ...]) -> None:
        self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: tuple[Event, ...]) -> None:
        """Sort a step's events by stream; an event of a request that is over has no owner and ends here."""
        for event in events:
            with self._alone(event.request_id):
                self._post(event)

    def _post(self, event: Event) -> None:
        owner = self._owners.get(event.request_id)
        if owner is None:
            return
        stream, call = owner
        if not stream.ended:
            stream.post_event(call, event)
        if isinstance(event, Failure) or event.usage is not None:
            del self._owners[event.request_id], stream.open[call]
            if not self._owners:
                self._idle.set()

    @contextmanager
    def _alone(self, request_id: RequestId) -> Iterator[None]:
        """Let an error inside end this request and no other."""
        try:
            yield
        except QuireError as error:
            self._post(Failure(request_id, error.status, str(error)))
        except Exception as error:
            log.exception("request %s fails, and the service goes on", request_id)
            self._engine.cancel(request_id)
            message = f"{_UNSAYABLE} ({type(error).__name__}: {error})"
            self._post(Failure(request_id, Status.INTERNAL, message))


def bind(host: str) -> tuple[grpc.aio.Server, str]:
    """A server on a free port of `host`, which answers from `serve` on, and its address, host:port.

    The address is known before the engine is: it is part of the name under which others find it.
    """
    server = grpc.aio.server(options=(*INTERNAL_CHANNEL, ("grpc.so_reuseport", 0)))
    return server, f"{host}:{server.add_insecure_port(f'{host}:0')}"


async def listen(service: EngineService, host: str) -> tuple[grpc.aio.Server, str]:
    """Serves on a free port of `host`; returns the server and its address, host:port."""
    server, address = bind(host)
    await serve(server, service)
    return server, address


async def serve(server: grpc.aio.Server, service: EngineService) -> None:
    """From now on the bound server answers."""
    engine_pb2_grpc.add_EngineServicer_to_server(service, server)
    await server.start()
