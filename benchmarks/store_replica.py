"""A replica of the demo model in a process of its own, put together as in a deployment but without Ray.

Engine service and gRPC messages, links, host memory as configured; the directory is another process behind a
Unix socket. Whether to fetch can be told: else the cost model decides, and learns only from those choices.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.managers import BaseManager
from typing import Any, TypeVar

from quire.kvstore.books.keys import BlockKey
from quire.kvstore.peers.announcer import ChannelLost
from quire.kvstore.peers.cost import Choice, CostModel, Decision
from quire.kvstore.peers.directory import Announcement, Directory, Holder
from quire.kvstore.peers.ids import ReplicaId
from quire.replicas.config import EngineConfig
from quire.replicas.engine.async_engine import AsyncEngine
from quire.replicas.engine.peer_network import GrpcPeers, peer_name
from quire.replicas.engine.service import EngineService, bind, serve
from quire.replicas.request import Event, Failure, Output, Request, RequestId, SamplingParams

HOST, SECRET = "127.0.0.1", "benchmark"
T = TypeVar("T")


class ToldCost(CostModel):
    """Decides as it is told, and then learns nothing; told nothing, it is the engine's own."""

    told: Choice | None = None

    def decide(
        self,
        owner: ReplicaId,
        size_bytes: int,
        tokens: int,
        queued_tokens: int,
        now_s: float,
        before: int = 0,
    ) -> Decision:
        if self.told is not None:
            return Decision(self.told, None, None)
        return super().decide(owner, size_bytes, tokens, queued_tokens, now_s, before)

    def prefilled(self, tokens: int, seconds: float, now_s: float, before: float = 0.0) -> None:
        if self.told is None:
            super().prefilled(tokens, seconds, now_s, before)

    def fetched(
        self, owner: ReplicaId, size_bytes: int, seconds: float, now_s: float, decision: Decision
    ) -> None:
        if self.told is None:
            super().fetched(owner, size_bytes, seconds, now_s, decision)

    def failed(self, owner: ReplicaId, seconds: float, now_s: float, decision: Decision) -> None:
        if self.told is None:
            super().failed(owner, seconds, now_s, decision)


class Books:
    """The directory, for callers of several threads."""

    def __init__(self) -> None:
        self._directory = Directory(1_000_000, silence_s=3600)
        self._lock = threading.Lock()
        self._liar: ReplicaId | None = None

    def announce(self, said: Announcement) -> bool:
        with self._lock:
            return self._directory.announce(said, time.monotonic())

    def lookup(self, chain: tuple[BlockKey, ...]) -> tuple[Holder, ...]:
        if self._liar is not None:
            return (Holder(self._liar, len(chain)),)
        with self._lock:
            return self._directory.lookup(chain)

    def lie(self, owner: ReplicaId | None) -> None:
        """From now on `owner` is said to hold everything; None: the truth is told again."""
        self._liar = owner


class DirectoryProcess(BaseManager):
    """Serves one `Books` to all processes, at a Unix socket."""

    def __init__(self, address: str) -> None:
        super().__init__(address, authkey=SECRET.encode())

    def start(self, *args: Any, **kwargs: Any) -> None:
        super().start(*args, **kwargs)
        # multiprocessing drops the object with its last user, and fails one that connects at that moment.
        self._user = self.books()  # type: ignore[attr-defined]


_BOOKS = Books()
DirectoryProcess.register("books", callable=lambda: _BOOKS)


class RemoteDirectory:
    """`DirectoryAccess` by way of the process' socket; while that is gone, every call looks for it again."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._books: Any = None

    def announce(self, said: Announcement) -> bool:
        return self._call(lambda books: books.announce(said))

    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]:
        return self._call(lambda books: books.lookup(tuple(chain)))

    def owners(self) -> tuple[ReplicaId, ...]:
        return ()

    def _call(self, call: Callable[[Any], T]) -> T:
        try:
            if self._books is None:
                process = DirectoryProcess(self._address)
                process.connect()
                self._books = process.books()  # type: ignore[attr-defined]
            return call(self._books)
        except (OSError, EOFError) as error:
            self._books = None
            raise ChannelLost(str(error)) from error


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request at a replica took, found and was answered."""

    first_token_s: float
    cached_tokens: int
    bytes_received: int
    explored: bool
    answer: tuple[tuple[int, float], ...]
    """Tokens and their log-probabilities: equal only if the logits were."""


class Replica:
    """Its methods are called by the parent process."""

    def __init__(self, config: EngineConfig, directory: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._events: list[Event] = []
        self._more = threading.Condition()
        self._number = 0
        self._engine: AsyncEngine
        self._wait(self._open(config, directory))
        self.learn_anew()

    def ask(self, prompt: list[int], told: Choice | None, new_tokens: int = 1) -> Asked:
        """A greedy request."""
        before, explored = self._engine.stats().bytes_received, self._cost.stats.explorations
        self._cost.told = told
        self._number += 1
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0)
        self._engine.submit(Request(id=RequestId(str(self._number)), prompt=tuple(prompt), sampling=sampling))
        outputs = self._answer()
        last = outputs[-1]
        assert last.usage is not None
        assert last.timings is not None
        assert last.timings.first_token_s is not None
        return Asked(
            last.timings.first_token_s,
            last.usage.cached_tokens,
            self._engine.stats().bytes_received - before,
            self._cost.stats.explorations > explored,
            tuple((p.token_id, p.logprob) for output in outputs for p in output.logprobs),
        )

    def forget(self) -> None:
        """Empty the pool, and tell the directory."""
        with self._engine._stepping:
            pool = self._engine._engine._pool
            pool.release(pool.allocate(pool.available))
        time.sleep(0.15)

    def learn_anew(self) -> None:
        """As if it had never fetched nor computed."""
        self._cost = ToldCost()
        self._engine._engine.waits._cost = self._cost

    def page_bytes(self) -> int:
        info = self._engine.info
        return int(info.bytes_per_token * info.page_tokens)

    def bf16_page_bytes(self) -> int:
        info = self._engine.info
        return int(info.bf16_bytes_per_token * info.page_tokens)

    async def _open(self, config: EngineConfig, directory: str) -> None:
        self._server, address = bind(HOST)
        self.name = peer_name(address)
        network = GrpcPeers(self.name, SECRET, RemoteDirectory(directory))
        self._engine = await asyncio.to_thread(AsyncEngine, config, network=network)
        service = EngineService(self, secret=SECRET, replica_id=address, peer_id=self.name)  # type: ignore[arg-type]
        await serve(self._server, service)

    def _answer(self) -> list[Output]:
        with self._more:
            ended = self._more.wait_for(lambda: any(_is_last(event) for event in self._events), 120)
            events, self._events = self._events, []
        assert ended, "no answer in two minutes"
        assert all(isinstance(event, Output) for event in events), events
        return [event for event in events if isinstance(event, Output)]

    # ---- the service's engine: no gateway connects, so all events are ours

    def start(self, _: Callable[[tuple[Event, ...]], None]) -> None:
        self._engine.start(self._deliver)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _deliver(self, events: tuple[Event, ...]) -> None:
        with self._more:
            self._events += events
            self._more.notify()

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(120)


def _is_last(event: Event) -> bool:
    return isinstance(event, Failure) or event.usage is not None


class Remote:
    """A replica, from the parent."""

    def __init__(self, config: EngineConfig, directory: str, kind: type[Replica] = Replica) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([AsyncEngine.__module__])  # it cannot import this file
        self._control, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(kind, config, directory, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Raises EOFError if it did not start."""
        self._control.recv()

    def call(self, name: str, *arguments: object) -> Any:
        """Raises EOFError if it dies meanwhile."""
        self.begin(name, *arguments)
        return self._control.recv()

    def begin(self, name: str, *arguments: object) -> None:
        """Send a call without waiting for its answer: the replica is about to be faulted."""
        self._control.send((name, *arguments))

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._control.close()


def _serve(kind: type[Replica], config: EngineConfig, directory: str, control: Connection) -> None:
    """Answers calls of the replica's methods until its parent is gone."""
    replica = kind(config, directory)
    control.send(None)
    while True:
        try:
            name, *arguments = control.recv()
        except EOFError:
            return
        control.send(getattr(replica, name)(*arguments))
