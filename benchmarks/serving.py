"""Tokens per second through the gateway, beside what is behind it alone; latencies; what cancellations leave.

    python benchmarks/serving.py [--shape FOLDER] [--json FILE]

Replica, gateway and clients are processes of their own on the loopback, as when served; Ray Serve, which only
names the replica when a request starts, is left out. Cases:
`served` 64 streams on a real engine, beside the same requests handed to the same engine in its own process;
`gateway` 256 streams on an engine that computes nothing, beside 10,000 tokens/s;
`cancelled` a quarter of 64 streams dropped at random moments: their pages free within two steps.
With --shape, the engine has random weights of the sizes that the folder's config.json tells.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from rows import Row, alternate, median, report

from quire.cluster import AsyncClient, SamplingParams
from quire.cluster.config import GatewayConfig
from quire.cluster.gateway.grpc_service import InferenceService
from quire.cluster.gateway.replica_streams import ReplicaStreams
from quire.cluster.gateway.server import listen as listen_to_clients
from quire.kvstore.books.keys import KeySpace
from quire.replicas.config import EngineConfig, PoolConfig
from quire.replicas.engine import service
from quire.replicas.engine.async_engine import AsyncEngine
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.model.checkpoint import find_model
from quire.replicas.request import (
    Event,
    Failure,
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

SECRET = "benchmark"
PROMPT_TOKENS, NEW_TOKENS = 64, 64
SERVED_STREAMS, GATEWAY_STREAMS = 64, 256
STUB_TOKENS, STUB_STEP_S = 200, 0.015
TARGET_GATEWAY = 10_000.0
MAX_STEPS_TO_FREE = 2
Deliver = Callable[[tuple[Event, ...]], None]


class StubEngine:
    """Every step gives each running request one token; a step takes no time but the pause after it."""

    def __init__(self) -> None:
        self.info = ModelInfo(
            model="stub",
            architecture="Stub",
            vocab_size=4096,
            max_model_tokens=4096,
            eos_token_ids=(),
            tp=1,
            page_tokens=64,
            kv_formats=(),
            bytes_per_token=1.0,
            bf16_bytes_per_token=2.0,
        )
        self.keys = KeySpace(b"", b"", b"")
        self.load = LoadReport()
        self._left: dict[RequestId, int] = {}
        self._arrived = threading.Condition()

    def start(self, deliver: Deliver) -> None:
        threading.Thread(target=self._run, args=(deliver,), daemon=True).start()

    def submit(self, request: Request) -> None:
        with self._arrived:
            self._left[request.id] = request.sampling.max_tokens
            self._arrived.notify()

    def cancel(self, request_id: RequestId) -> None:
        with self._arrived:
            self._left.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats()

    def _run(self, deliver: Deliver) -> None:
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._left)
                deliver(tuple(map(self._token, list(self._left))))
            time.sleep(STUB_STEP_S)

    def _token(self, request_id: RequestId) -> Output:
        self._left[request_id] -= 1
        if self._left[request_id]:
            return Output(request_id=request_id, index=0, text="token", token_ids=(7,))
        del self._left[request_id]
        return Output(
            request_id=request_id,
            index=0,
            text="token",
            token_ids=(7,),
            finish_reason=FinishReason.LENGTH,
            usage=Usage(prompt_tokens=1, cached_tokens=0, output_tokens=1),
            timings=Timings(queue_s=0.0, first_token_s=0.0, total_s=0.0),
        )


class Watched:
    """A real engine that also takes requests in its own process, and times how cancellations end."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._own: dict[RequestId, int] = {}
        self._done = threading.Event()
        self._cancelled_at: dict[RequestId, int] = {}
        self.steps_to_free: list[int] = []

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def keys(self) -> KeySpace:
        return self._engine.keys

    @property
    def load(self) -> LoadReport:
        return self._engine.load

    def start(self, deliver: Deliver) -> None:
        def sort(events: tuple[Event, ...]) -> None:
            for event in events:
                self._watch(event)
            deliver(events)

        self._engine.start(sort)

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def cancel(self, request_id: RequestId) -> None:
        self._cancelled_at.setdefault(request_id, self.stats().steps)
        self._engine.cancel(request_id)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def check(self) -> None:
        self._engine.check()

    def own_speed(self, requests: list[Request]) -> float:
        """Tokens per second of these requests without any service."""
        self._done.clear()
        self._own = {request.id: 0 for request in requests}
        started = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        self._done.wait()
        return sum(request.sampling.max_tokens for request in requests) / (time.perf_counter() - started)

    def _watch(self, event: Event) -> None:
        if not isinstance(event, Failure) and event.usage is None:
            return
        at = self._cancelled_at.pop(event.request_id, None)
        if at is not None:
            self.steps_to_free.append(self.stats().steps - at)
        if self._own.pop(event.request_id, None) is not None and not self._own:
            self._done.set()


DEMO = EngineConfig(model="demo", kv="int8", pool=PoolConfig(bytes=128 << 20))


def replica_process(pipe: Connection, config: EngineConfig | None) -> None:
    """Serves, and answers ("own", requests) and ("cancelled",) on the pipe. No `config`: computes nothing."""
    logging.disable(logging.WARNING)
    engine = Watched(AsyncEngine(config)) if config else None

    async def main() -> None:
        served = service.EngineService(
            engine or StubEngine(),
            secret=SECRET,
            replica_id="replica",
            tokenizer=read_tokenizer(find_model("demo")),
        )
        _, address = await service.listen(served, "127.0.0.1")
        pipe.send(address)
        while (asked := await asyncio.to_thread(pipe.recv))[0] != "stop":
            assert engine is not None
            if asked[0] == "own":
                pipe.send(await asyncio.to_thread(engine.own_speed, asked[1]))
            else:
                engine.check()
                pipe.send((engine.steps_to_free, engine.stats()))

    asyncio.run(main())


def gateway_process(pipe: Connection, replica: str) -> None:
    async def main() -> None:
        streams = ReplicaStreams(_Only(replica), secret=SECRET, wait_s=30)
        inference = InferenceService(streams, max_open_requests=4096)
        listener = await listen_to_clients(inference, GatewayConfig(port=0))
        pipe.send(f"127.0.0.1:{listener.port}")
        await asyncio.to_thread(pipe.recv)

    asyncio.run(main())


@dataclass(frozen=True)
class _Only:
    """A source with one replica, at this address."""

    address: str

    def follow(self, listed: Callable[[Mapping[str, str]], None]) -> None:
        listed({"replica": self.address})

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        yield


@dataclass
class Traffic:
    """What the clients saw."""

    tokens: int = 0
    seconds: float = 0.0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


async def load(address: str, prompts: list[list[int]], new_tokens: int, leave: dict[int, float]) -> Traffic:
    """All prompts at once; stream n is dropped after `leave[n]` seconds, if given."""
    seen = Traffic()
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    async with AsyncClient(address) as client:
        await client.model()
        started = time.perf_counter()

        async def one(prompt: list[int]) -> None:
            last = started
            async for delta in client.generate(prompt, sampling):
                now = time.perf_counter()
                (seen.first_s if last == started else seen.between_s).append(now - last)
                last = now
                seen.tokens += len(delta.token_ids)

        async def some(number: int, prompt: list[int]) -> None:
            try:
                async with asyncio.timeout(leave.get(number)):
                    await one(prompt)
            except TimeoutError:
                return

        await asyncio.gather(*(some(n, prompt) for n, prompt in enumerate(prompts)))
        seen.seconds = time.perf_counter() - started
    return seen


@contextmanager
def child(target: Callable[..., None], *args: object) -> Iterator[tuple[Connection, str]]:
    """A process that reports its address; told to stop, and waited for, at the end."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=target, args=(theirs, *args), daemon=True)
    process.start()
    try:
        yield ours, ours.recv()
        ours.send(("stop",))
        process.join(2)
    finally:
        process.kill()
        process.join()


def prompts_of(count: int, seed: int) -> list[list[int]]:
    """Random tokens: nothing is found in the cache."""
    rng = random.Random(seed)
    return [[rng.randrange(10, 4096) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def served(config: EngineConfig, rounds: int) -> list[Row]:
    """64 streams against the same 64 requests without service, in turn; then the cancellations."""
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    seen: list[Traffic] = []
    with (
        child(replica_process, config) as (replica, address),
        child(gateway_process, address) as (_, gateway),
    ):

        def alone(number: int) -> float:
            prompts = prompts_of(SERVED_STREAMS, 2 * number)
            requests = [
                Request(id=RequestId(f"own{number}.{n}"), prompt=tuple(prompt), sampling=sampling)
                for n, prompt in enumerate(prompts)
            ]
            replica.send(("own", requests))
            return float(replica.recv())

        def through(number: int) -> float:
            prompts = prompts_of(SERVED_STREAMS, 2 * number + 1)
            seen.append(asyncio.run(load(gateway, prompts, NEW_TOKENS, {})))
            return seen[-1].speed

        alone(1000)  # compiles what is compiled at first use
        speeds = alternate({"alone": alone, "through": through}, rounds)
        rows = [
            _speed("served streams=64", median(speeds["through"]), "engine alone", median(speeds["alone"]))
        ]
        rows += _latencies("served streams=64", seen)
        return rows + _cancellations(replica, gateway)


def _cancellations(replica: Connection, gateway: str) -> list[Row]:
    rng = random.Random(3)
    leave = {n: rng.uniform(0.05, 2.0) for n in range(0, SERVED_STREAMS, 4)}
    asyncio.run(load(gateway, prompts_of(SERVED_STREAMS, 99_999), NEW_TOKENS, leave))
    replica.send(("cancelled",))
    steps, stats = replica.recv()
    free = stats.pages_free + stats.pages_cached
    case = f"cancelled streams={len(leave)} of {SERVED_STREAMS}"
    return [
        _against(case, "cancelled_requests", len(steps), "requests", "all", len(leave)),
        _against(case, "most_steps_until_free", max(steps), "steps", "two steps", MAX_STEPS_TO_FREE),
        _against(case, "pages_back", free, "pages", "all pages", stats.pages_total),
    ]


def gateway_alone(rounds: int) -> list[Row]:
    """256 streams, one message each and step, through the gateway with nothing computed behind it."""
    case = f"gateway streams={GATEWAY_STREAMS}"
    with child(replica_process, None) as (_, address), child(gateway_process, address) as (_, gateway):
        seen = [
            asyncio.run(load(gateway, prompts_of(GATEWAY_STREAMS, n), STUB_TOKENS, {})) for n in range(rounds)
        ]
    return [_speed(case, median([s.speed for s in seen]), "target", TARGET_GATEWAY), *_latencies(case, seen)]


def _latencies(case: str, seen: list[Traffic]) -> list[Row]:
    """p50 and p99 over all rounds; the baseline of a p99 is its p50."""
    rows = []
    for metric, times in (
        ("first_token", sorted(t for s in seen for t in s.first_s)),
        ("between_tokens", sorted(t for s in seen for t in s.between_s)),
    ):
        p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
        rows.append(_against(case, f"{metric}_p50", p50 * 1e3, "ms", "itself", p50 * 1e3))
        rows.append(_against(case, f"{metric}_p99", p99 * 1e3, "ms", "p50", p50 * 1e3))
    return rows


def _speed(case: str, value: float, baseline: str, baseline_value: float) -> Row:
    return _against(case, "output_tokens_per_s", value, "tokens/s", baseline, baseline_value)


def _against(case: str, metric: str, value: float, unit: str, baseline: str, baseline_value: float) -> Row:
    return Row(case, metric, value, unit, baseline, value / baseline_value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", help="folder of a config.json")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    config = EngineConfig(model=args.shape, kv="int8", weights="random") if args.shape else DEMO
    report(gateway_alone(args.rounds) + served(config, args.rounds), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
