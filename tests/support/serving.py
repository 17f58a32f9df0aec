"""A gateway and its replicas in one event loop, without Ray: real gRPC, engines of the test's choosing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from multiprocessing.connection import Connection

import grpc

from quire.cluster import AsyncClient
from quire.cluster.config import GatewayConfig
from quire.cluster.gateway.grpc_service import InferenceService
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.cluster.gateway.server import Listener
from quire.cluster.gateway.server import listen as listen_to_clients
from quire.cluster.routing.replica_table import ReplicaTable, RoutedRequest
from quire.cluster.routing.score import Candidate, Ranking, Reason
from quire.kvstore.books.keys import KeySpace
from quire.replicas.engine import service
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.model.checkpoint import find_model
from quire.replicas.request import (
    Event,
    FinishReason,
    ModelInfo,
    Output,
    Request,
    RequestId,
    Timings,
    Usage,
)
from quire.replicas.stats import EngineStats
from quire.replicas.text.tokenizer_files import read_tokenizer

SECRET = "tests only"
INFO = ModelInfo(
    model="demo",
    architecture="Scripted",
    vocab_size=4096,
    max_model_tokens=256,
    eos_token_ids=(2,),
    tp=1,
    page_tokens=64,
    kv_formats=(("int8", "int4"),),
    bytes_per_token=100.0,
    bf16_bytes_per_token=200.0,
)

TOKENIZER = read_tokenizer(find_model("demo"))
KEYS = KeySpace(b"layout", b"weights", b"transforms")


class ScriptedEngine:
    """Does what the test tells it: the test sends events, and sees requests and cancellations."""

    def __init__(self, info: ModelInfo = INFO, keys: KeySpace = KEYS) -> None:
        self.info, self.keys = info, keys
        self.load = LoadReport(pages_total=7)
        self.requests: asyncio.Queue[Request] = asyncio.Queue()
        self.cancelled: asyncio.Queue[RequestId] = asyncio.Queue()
        self.refusal: Exception | None = None
        self._deliver: Callable[[tuple[Event, ...]], None]

    def start(self, deliver: Callable[[tuple[Event, ...]], None]) -> None:
        self._deliver = deliver

    def submit(self, request: Request) -> None:
        if self.refusal:
            raise self.refusal
        self.requests.put_nowait(request)

    def cancel(self, request_id: RequestId) -> None:
        self.cancelled.put_nowait(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(running=1, pages_free=7, step_part_seconds={"forward": 2.0}, output_tokens=10)

    def send(self, *events: Event) -> None:
        """One step's events."""
        self._deliver(events)

    def say(self, request: Request, text: str, *tokens: int, last: bool = False, index: int = 0) -> None:
        self.send(output(request, text, *tokens, last=last, index=index))


def output(request: Request, text: str, *tokens: int, last: bool = False, index: int = 0) -> Output:
    return Output(
        request_id=request.id,
        index=index,
        text=text,
        token_ids=tokens,
        finish_reason=FinishReason.STOP if last else None,
        usage=Usage(prompt_tokens=len(request.prompt), cached_tokens=0, output_tokens=9) if last else None,
        timings=Timings(queue_s=0.0, first_token_s=0.25, total_s=0.5) if last else None,
    )


def replica_process(address: Connection) -> None:
    """A replica for a process of its own: it computes nothing, and says where it is."""

    async def for_ever() -> None:
        served = service.EngineService(ScriptedEngine(), secret=SECRET, replica_id="r", tokenizer=TOKENIZER)
        server, at = await service.listen(served, "127.0.0.1")
        address.send(at)
        await server.wait_for_termination()

    asyncio.run(for_ever())


class Listed:
    """A source of replicas that lists what the test says, id to address."""

    def __init__(self, replicas: Mapping[str, str] | None = None) -> None:
        self.replicas = dict(replicas or {})
        self.waits = 0
        """Requests that wait for a replica."""
        self._followers: list[Callable[[Mapping[str, str]], None]] = []

    def follow(self, listed: Callable[[Mapping[str, str]], None]) -> None:
        self._followers.append(listed)
        listed(dict(self.replicas))

    def now(self, replicas: Mapping[str, str]) -> None:
        """From now on there are these."""
        for listed in self._followers:
            listed(dict(replicas))

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        self.waits += 1
        try:
            yield
        finally:
            self.waits -= 1


class InTurn(ReplicaTable):
    """Chooses one replica after the other."""

    _turn = 0

    def _rank(self, request: RoutedRequest, candidates: Sequence[Candidate]) -> Ranking:
        self._turn += 1
        names = sorted(candidate.replica_id for candidate in candidates)
        return Ranking((names[self._turn % len(names)],), Reason.BLIND, None)


def open_requests(streams: ReplicaStreams) -> dict[str, int]:
    """By replica, as the gateway's table has it."""
    return {name: len(replica.open) for name, replica in streams.table._replicas.items()}


async def connected(streams: ReplicaStreams, count: int) -> None:
    """Until the gateway has this many streams."""
    async with asyncio.timeout(60):
        while streams.connected < count:
            await asyncio.sleep(0.005)


class Stage:
    """What `staged` puts up. `address`: of all gateways."""

    def __init__(
        self,
        streams: list[ReplicaStreams],
        client: AsyncClient,
        address: str,
        services: list[service.EngineService],
        servers: list[grpc.aio.Server],
        gateways: list[Listener],
    ) -> None:
        self.streams, self.client, self.address = streams, client, address
        self.services, self._servers, self._gateways = services, servers, gateways

    @property
    def open_requests(self) -> int:
        """What the gateways count, over all replicas."""
        return sum(sum(open_requests(streams).values()) for streams in self.streams)

    async def kill_replica(self, number: int) -> None:
        """Its stream breaks at once, as when its process dies."""
        await self._servers[number].stop(None)

    async def kill_gateway(self, number: int) -> None:
        """As above."""
        await self._gateways[number].server.stop(None)


@asynccontextmanager
async def staged(
    *engines: service.Engine,
    gateways: int = 1,
    tokenizers: Sequence[Mapping[str, bytes]] = (),
    max_open_requests: int = 64,
    wait_s: float = 5.0,
) -> AsyncIterator[Stage]:
    """A replica for each engine, one gateway or more, one client. `tokenizers`: of the engines' models."""
    async with AsyncExitStack() as stack:
        replicas, services, servers = {}, [], []
        for number, engine in enumerate(engines):
            name = f"replica{number}"
            files = tokenizers[number] if tokenizers else TOKENIZER
            served = service.EngineService(engine, secret=SECRET, replica_id=name, tokenizer=files)
            server, address = await service.listen(served, "127.0.0.1")
            stack.push_async_callback(server.stop, None)
            replicas[name] = address
            services.append(served)
            servers.append(server)
        listeners, of_gateways = [], []
        for _ in range(gateways):
            streams = ReplicaStreams(Listed(replicas), secret=SECRET, wait_s=wait_s, table=InTurn())
            stack.push_async_callback(streams.close)
            inference = InferenceService(streams, max_open_requests=max_open_requests)
            gateway = await listen_to_clients(inference, GatewayConfig(port=0))
            stack.push_async_callback(gateway.stop, None)
            listeners.append(gateway)
            of_gateways.append(streams)
            await connected(streams, len(engines))
        address = ",".join(f"127.0.0.1:{gateway.port}" for gateway in listeners)
        client = await stack.enter_async_context(AsyncClient(address))
        yield Stage(of_gateways, client, address, services, servers, listeners)
