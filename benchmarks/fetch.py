"""Time to first token of a prompt that a neighbour holds: fetched, recomputed, and as the engine chooses.

    scripts/loopback python benchmarks/fetch.py [--json FILE]

Two replicas of the demo model (told that it may read 16K tokens) are processes of their own, put together as
in a deployment: Engine services and gRPC messages, links, directory. Only Ray is missing: the directory is a
third process behind a Unix socket, so its few bytes are not on the shaped link. A has computed every prompt;
B's pool is emptied before every request. Fetch and recompute are forced by a cost model in this file, which
learns only while the choice is its own: the choice has not seen what was measured by force.

`tc` shapes the loopback (tbf), so this needs the namespace of scripts/loopback. Bytes are the interface's,
TCP and IP headers and control messages included, both directions.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, TypeVar

from engine import longer_model
from rows import Row, alternate, median, merge, report

from quire.kvstore.announcer import ChannelLost
from quire.kvstore.cost import Choice, CostModel, Decision
from quire.kvstore.directory import Announcement, Directory, Holder
from quire.kvstore.keys import BlockKey
from quire.kvstore.messages import ReplicaId
from quire.replicas.async_engine import AsyncEngine
from quire.replicas.config import EngineConfig, PoolConfig, StoreConfig
from quire.replicas.neighbours import GrpcNeighbours, peer_name
from quire.replicas.request import Event, Failure, Output, Request, RequestId, SamplingParams
from quire.replicas.service import EngineService, bind, serve

HOST, SECRET = "127.0.0.1", "benchmark"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LINKS = {
    "10 Gb/s": ("int8", 10_000),
    "5 Gb/s": ("int8", 5_000),
    "1 Gb/s": ("int8", 1_000),
    "100 Mb/s": ("fp32", 100),
}
"""Pages and Mb/s. On the last one, with the largest pages, computing short prompts is sooner. Slower links do
not serve: at 40 Mb/s chunks of 4 MB are not through in the second that a link grants them."""
LEARNING_ROUNDS = 1
SLOW_MBIT, SLOW_ROUNDS = 100, 3
EVERY, LONG_EVERY, LONG_TOKENS = 3, 9, 8192
"""Recomputing takes seconds and is far from fetching on fast links: it is measured in every third round, long
prompts in every ninth. On the slow link the longest prompt is asked in every third round only."""
PAGE_TOKENS, POOL_BYTES = 64, 256 << 20
PATIENCE_S = 30.0
WIRE_TOKENS = 2048
TARGET_CHOICE, TARGET_WIRE = 1.10, 1.01
TARGET_OF_BF16 = {"int8": 0.52, "int4": 0.29}
MODES = {"fetch": Choice.FETCH, "recompute": Choice.RECOMPUTE, "chosen": None}
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

    def prefilled(self, tokens: int, seconds: float, before: float = 0.0) -> None:
        if self.told is None:
            super().prefilled(tokens, seconds, before)

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

    def announce(self, said: Announcement) -> bool:
        with self._lock:
            return self._directory.announce(said, time.monotonic())

    def lookup(self, chain: tuple[BlockKey, ...]) -> tuple[Holder, ...]:
        with self._lock:
            return self._directory.lookup(chain)


class _Manager(BaseManager):
    """Serves one `Books` to all processes."""


_BOOKS = Books()
_Manager.register("books", callable=lambda: _BOOKS)


class RemoteDirectory:
    """`DirectoryAccess` by way of the manager's Unix socket."""

    def __init__(self, address: str) -> None:
        manager = _Manager(address, authkey=SECRET.encode())
        manager.connect()
        self._books: Any = manager.books()  # type: ignore[attr-defined]

    def announce(self, said: Announcement) -> bool:
        return self._call(lambda: self._books.announce(said))

    def lookup(self, chain: Sequence[BlockKey]) -> tuple[Holder, ...]:
        return self._call(lambda: self._books.lookup(tuple(chain)))

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (OSError, EOFError) as error:
            raise ChannelLost(str(error)) from error


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request at a replica took and found."""

    first_token_s: float
    cached_tokens: int
    bytes_received: int
    explored: bool


class Replica:
    """In its own process, as `replicas/deployment.py` puts it together, without Ray."""

    def __init__(self, model: str, kv: str, directory: str) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        config = EngineConfig(
            model=model,
            kv=kv,
            device="cpu",
            threads_per_shard=1,
            pool=PoolConfig(bytes=POOL_BYTES, page_tokens=PAGE_TOKENS),
            store=StoreConfig(lookup_timeout_s=2.0, fetch_timeout_s=PATIENCE_S),
        )
        self._events: list[Event] = []
        self._more = threading.Condition()
        self._number = 0
        self._engine: AsyncEngine
        self._wait(self._open(config, directory))
        self.learn_anew()

    def ask(self, prompt: list[int], told: Choice | None) -> Asked:
        """The pool is emptied, and the prompt's next token asked for."""
        with self._engine._stepping:
            pool = self._engine._engine._pool
            pool.release(pool.allocate(pool.available))
        time.sleep(0.15)  # the directory hears of it
        before, explored = self._engine.stats().bytes_received, self._cost.stats.explorations
        self._cost.told = told
        self._number += 1
        request_id = RequestId(str(self._number))
        sampling = SamplingParams(max_tokens=1, ignore_eos=True)
        self._engine.submit(Request(id=request_id, prompt=tuple(prompt), sampling=sampling))
        with self._more:
            self._more.wait_for(lambda: self._events, 120)
            (event,) = self._events
            self._events = []
        assert isinstance(event, Output), event
        assert event.usage is not None
        assert event.timings is not None
        assert event.timings.first_token_s is not None
        received = self._engine.stats().bytes_received - before
        explored = self._cost.stats.explorations > explored
        return Asked(event.timings.first_token_s, event.usage.cached_tokens, received, explored)

    def compute(self, prompt: list[int]) -> None:
        """Without asking anybody, and to keep."""
        self._cost.told = Choice.RECOMPUTE
        request = Request(id=RequestId("keep"), prompt=tuple(prompt), sampling=SamplingParams(max_tokens=1))
        self._engine.submit(request)
        with self._more:
            self._more.wait_for(lambda: self._events, 120)
            assert not isinstance(self._events[0], Failure), self._events
            self._events = []

    def learn_anew(self) -> None:
        """As if B had never fetched nor computed."""
        self._cost = ToldCost()
        self._engine._engine.sharing._cost = self._cost  # type: ignore[union-attr]

    def page_bytes(self) -> int:
        info = self._engine.info
        return int(info.bytes_per_token * PAGE_TOKENS)

    def bf16_page_bytes(self) -> int:
        return int(self._engine.info.bf16_bytes_per_token * PAGE_TOKENS)

    async def _open(self, config: EngineConfig, directory: str) -> None:
        self._server, address = bind(HOST)
        me = peer_name(address)
        neighbours = GrpcNeighbours(me, SECRET, RemoteDirectory(directory))
        self._engine = await asyncio.to_thread(AsyncEngine, config, neighbours=neighbours)
        service = EngineService(self, secret=SECRET, replica_id=address, peer_id=me)  # type: ignore[arg-type]
        await serve(self._server, service)

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


def replica_process(model: str, kv: str, directory: str, control: Connection) -> None:
    """Answers calls of `Replica`'s methods until it reads None."""
    replica = Replica(model, kv, directory)
    control.send(None)
    while (call := control.recv()) is not None:
        name, *arguments = call
        control.send(getattr(replica, name)(*arguments))


class Remote:
    """A replica, from the parent."""

    def __init__(self, *arguments: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        self.process = context.Process(target=replica_process, args=(*arguments, theirs), daemon=True)
        self.process.start()

    def ready(self) -> None:
        self._control.recv()

    def call(self, name: str, *arguments: object) -> Any:
        self._control.send((name, *arguments))
        return self._control.recv()

    def close(self) -> None:
        self._control.send(None)
        self.process.join(10)
        self.process.kill()


@contextmanager
def two_replicas(model: str, kv: str) -> Iterator[tuple[Remote, Remote]]:
    """A and B on an unshaped link."""
    with tempfile.TemporaryDirectory() as folder:
        manager = _Manager(f"{folder}/directory", authkey=SECRET.encode())
        manager.start()
        a, b = (Remote(model, kv, f"{folder}/directory") for _ in range(2))
        try:
            for replica in (a, b):
                replica.ready()
            yield a, b
        finally:
            for replica in (a, b):
                replica.close()
            manager.shutdown()


@contextmanager
def shaped(mbit: int) -> Iterator[None]:
    """The loopback at so many Mb/s. A burst of a millisecond, but two of its largest packets at least."""
    burst = max(mbit * 125, 128 << 10)
    rule = ["rate", f"{mbit}mbit", "burst", str(burst), "limit", str(64 << 20)]
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def loopback_bytes() -> int:
    """Received by the loopback interface since its start."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise OSError("no lo in /proc/net/dev")


def prompts() -> dict[int, list[int]]:
    """Random tokens, none a prefix of another."""
    rng = random.Random(0)
    return {n: [rng.randrange(10, 4096) for _ in range(n)] for n in LENGTHS}


def blocks_of(tokens: int) -> int:
    """Blocks of a prompt that can be found elsewhere: its last token is always computed."""
    return (tokens - 1) // PAGE_TOKENS


def link_rows(b: Remote, kv: str, link: str, rounds: int) -> list[Row]:
    """Every length at one link's speed, once the choice has learned."""
    b.call("learn_anew")
    texts = prompts()
    for _ in range(LEARNING_ROUNDS):
        for prompt in texts.values():
            b.call("ask", prompt, None)
    chosen_by: dict[int, list[Asked]] = {n: [] for n in LENGTHS}
    slow = LINKS[link][1] <= SLOW_MBIT

    def once(tokens: int, mode: str, number: int) -> float:
        if number % _every(tokens, mode, slow):
            return math.nan
        asked: Asked = b.call("ask", texts[tokens], MODES[mode])
        found = blocks_of(tokens) * PAGE_TOKENS
        if mode == "chosen":
            chosen_by[tokens].append(asked)
        else:
            if asked.cached_tokens != (found if mode == "fetch" else 0):
                print(f"{link} {tokens} tokens: {mode} failed, {asked}", flush=True)
                return math.nan
        return asked.first_token_s

    calls = {f"{n} {mode}": partial(once, n, mode) for n in LENGTHS for mode in MODES}
    seconds = {
        call: [value for value in values if not math.isnan(value)]
        for call, values in alternate(calls, rounds).items()
    }
    rows = []
    for n in LENGTHS:
        fetch, recompute, chosen = (median(seconds[f"{n} {mode}"]) * 1e3 for mode in MODES)
        case = f"fetch {kv} {link} {n} tokens"
        count = len(chosen_by[n])
        times = sum(asked.cached_tokens > 0 for asked in chosen_by[n])
        explored = sum(asked.explored for asked in chosen_by[n])
        rows += [
            Row(case, "fetch_ms", fetch, "ms", "recompute", fetch / recompute),
            Row(case, "recompute_ms", recompute, "ms", "itself", 1.0),
            Row(case, "chosen_ms", chosen, "ms", "the better", chosen / min(fetch, recompute)),
            Row(case, "chose_fetch", times, "requests", "all", times / count),
            Row(case, "explored", explored, "requests", "all", explored / count),
        ]
    report(rows, None)
    return rows


def _every(tokens: int, mode: str, slow: bool) -> int:
    """In which rounds it is measured."""
    long = tokens >= LONG_TOKENS
    if slow:
        return EVERY if tokens > LONG_TOKENS else 1
    return 1 if mode != "recompute" else LONG_EVERY if long else EVERY


def wire_rows(b: Remote, kv: str, rounds: int = 3) -> list[Row]:
    """Bytes at the interface for one fetch."""
    prompt = prompts()[WIRE_TOKENS]
    b.call("ask", prompt, Choice.FETCH)  # opens the link
    pages, wire = blocks_of(WIRE_TOKENS) * b.call("page_bytes"), []
    for _ in range(rounds):
        before = loopback_bytes()
        asked: Asked = b.call("ask", prompt, Choice.FETCH)
        wire.append(loopback_bytes() - before)
        assert asked.bytes_received == pages, (asked, pages)
    sent, bf16 = median(wire), blocks_of(WIRE_TOKENS) * b.call("bf16_page_bytes")
    case = f"wire {kv} {WIRE_TOKENS} tokens"
    rows = [
        Row(case, "wire_bytes", sent, "bytes", "page bytes", sent / pages),
        Row(case, "wire_bytes_of_bf16", sent, "bytes", "bf16 pages", sent / bf16),
    ]
    report(rows, None)
    return rows


def missed(rows: Sequence[Row]) -> list[str]:
    """What each row that misses its target missed."""
    lines = []
    for row in rows:
        limit = {"chosen_ms": TARGET_CHOICE, "wire_bytes": TARGET_WIRE}.get(row.metric)
        if row.metric == "wire_bytes_of_bf16":
            limit = TARGET_OF_BF16.get(row.case.split()[1])
        if limit is not None and row.ratio > limit:
            lines.append(f"{row.case} {row.metric}: {row.ratio:.3f}, wanted {limit}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = longer_model(Path(folder), max(LENGTHS) + 64)
        for kv in ("fp32", "int8", "int4", "bf16"):
            links = [link for link in args.links if LINKS[link][0] == kv]
            with two_replicas(model, kv) as (a, b):
                for n, prompt in prompts().items():
                    if links or n == WIRE_TOKENS:
                        a.call("compute", prompt)
                time.sleep(1.0)  # announced
                rows += wire_rows(b, kv)
                for link in links:
                    mbit = LINKS[link][1]
                    with shaped(mbit):
                        rounds = SLOW_ROUNDS if mbit <= SLOW_MBIT else args.rounds
                        rows += link_rows(b, kv, link, rounds)
                    if args.json:  # what is measured is kept
                        merge(rows, args.json)
    if args.json:
        merge(rows, args.json)
    print(*missed(rows), sep="\n")
    return bool(missed(rows))


if __name__ == "__main__":
    sys.exit(main())
