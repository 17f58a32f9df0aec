"""What 32 open streams see of a gateway, a replica and a worker node that are killed, and when all is whole.

    scripts/loopback python benchmarks/faults.py [--json FILE]

A Ray cluster of a head and three more raylets on this machine, two gateways, three replicas of the demo
model. One half of the streams is greedy, the other drawn at random without a seed. All have begun when they
die. Each is then one of three: untouched; carried on, by a gateway that sends it to another replica or by
the client at another gateway; ended as UNAVAILABLE with a hint when to try again. A greedy answer must be the
one it was before the faults; any other error, or an answer cut short, is wrong.

Whole again: Serve runs as many replicas and gateways as it should, and every gateway answers. Of that, the
time in which Serve waits for new processes to start and load their model is given apart.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from rows import Row, merge, report

from quire.cluster import AsyncClient, SamplingParams, collect_async
from quire.cluster.cli.rollout import APP, rolled_out
from quire.cluster.config import ServeConfig, parse
from quire.cluster.gateway_registry import addresses, by_actor
from quire.kvstore.peers.directory_actor import end_directory
from quire.protos.quire.v1 import inference_pb2
from quire.replicas.errors import QuireError, ReplicaDied

STREAMS, NEW_TOKENS = 32, 200
REPLICAS, GATEWAYS = 3, 2
LIMIT_S, LOOK_S = 120.0, 0.1
PROMPTS = [f"Long ago, a {who} named {name}" for who in ("cat", "fox", "hen", "owl") for name in "ABCDEFGH"]
CONFIG: ServeConfig = parse(
    {
        "engine": {
            "model": "demo",
            "device": "cpu",
            "threads_per_shard": 1,
            "pool": {"bytes": 16 << 20},
        },
        "gateway": {"cpus": 0.1, "port": 0, "count": GATEWAYS},
        "replicas": {
            "count": REPLICAS,
            "cpus_per_shard": 0.4,
            "health_check_period_s": 0.5,
            "graceful_shutdown_s": 5,
        },
    }
)


@dataclass
class Stream:
    """One request and what became of it."""

    client: AsyncClient
    prompt: str
    greedy: bool
    gateway: str = ""
    token_ids: list[int] = field(default_factory=list)
    error: QuireError | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0 if self.greedy else 1)
        try:
            async for delta in self.client.generate(self.prompt, sampling):
                self.gateway = self.gateway or self.client.gateway
                self.token_ids.extend(delta.token_ids)
                self.begun.set()
        except QuireError as error:
            self.error = error
        finally:
            self.begun.set()

    def wrong(self, right: Mapping[str, Sequence[int]]) -> bool:
        """Neither a whole answer, the right one if it is greedy, nor UNAVAILABLE with a hint."""
        if self.error is not None:
            return not (isinstance(self.error, ReplicaDied) and self.error.retry_s > 0)
        if self.greedy:
            return self.token_ids != right[self.prompt]
        return len(self.token_ids) != NEW_TOKENS


@dataclass(frozen=True)
class Process:
    """One of the application's."""

    name: str
    """Its actor's."""
    deployment: str
    node: str
    pid: int

    @property
    def short(self) -> str:
        """What gateways call a replica."""
        return self.name.rpartition("#")[2]


@dataclass(frozen=True)
class Victims:
    """What is to die at once."""

    pids: tuple[int, ...]
    processes: tuple[Process, ...]
    """What Serve knows of them."""


@contextmanager
def world() -> Iterator[dict[str, int]]:
    """A cluster with room for two replicas and both gateways on every node but the head; raylets by node."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        serve.start(proxy_location="Disabled")
        workers = [nodes.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(3)]
        yield {node.node_id: node.all_processes["raylet"][0].process.pid for node in workers}
    finally:
        serve.shutdown()
        end_directory(APP)
        ray.shutdown()
        nodes.shutdown()


def processes(deployment: str = "") -> list[Process]:
    """The application's that run, as far as Serve knows."""
    found = []
    for name, details in serve_details().items():
        for replica in details["replicas"]:
            if name.startswith(deployment) and replica["state"] == "RUNNING":
                found.append(Process(replica["actor_name"], name, replica["node_id"], replica["pid"]))
    return found


def serve_details() -> dict[str, Any]:
    """What Serve's controller knows of every deployment."""
    details: dict[str, Any] = _get_global_client().get_serve_details()
    return dict(details["applications"][APP]["deployments"])


def one_of(deployment: str) -> Victims:
    process = processes(deployment)[0]
    return Victims((process.pid,), (process,))


def node_of(raylets: Mapping[str, int]) -> Victims:
    """A worker node with as much on it as may go: a replica and a gateway must be left."""
    on = {node: [p for p in processes() if p.node == node] for node in raylets}
    for node, there in sorted(on.items(), key=lambda item: -len(item[1])):
        count = Counter(p.deployment for p in there)
        if 0 < count["Replica"] < REPLICAS and count["Gateway"] < GATEWAYS:
            below = psutil.Process(raylets[node]).children(recursive=True)
            return Victims((raylets[node], *(process.pid for process in below)), tuple(there))
    raise SystemExit(f"whichever node is killed, too little is left: {on}")


async def right_answers() -> dict[str, list[int]]:
    """Of every prompt, greedily."""
    async with AsyncClient(",".join(addresses(APP))) as client:
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        answers = await asyncio.gather(*(collect_async(client.generate(p, sampling)) for p in PROMPTS))
    return {p: answer.outputs[0].token_ids for p, answer in zip(PROMPTS, answers, strict=True)}


async def stats_of(gateways: Sequence[str]) -> list[inference_pb2.Stats]:
    """What each of them knows."""
    found = []
    for gateway in gateways:
        async with AsyncClient(gateway) as client:
            found.append(await client.stats())
    return found


async def fault(name: str, victims: Victims, right: Mapping[str, Sequence[int]]) -> list[Row]:
    """Kills under open streams; waits until the streams have ended and all is whole again."""
    named = by_actor(APP)
    dying = {named[process.name] for process in victims.processes if process.name in named}
    spared = [address for address in named.values() if address not in dying]
    every = ",".join(named.values())
    streams = [Stream(AsyncClient(every), prompt, n % 2 == 0) for n, prompt in enumerate(PROMPTS)]
    runs = [asyncio.create_task(stream.run()) for stream in streams]
    await asyncio.gather(*(stream.begun.wait() for stream in streams))
    before = await stats_of(spared)
    assert not any(run.done() for run in runs), "a stream ended before the fault"
    for pid in victims.pids:  # a node's at once, as if its power had gone
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    whole = asyncio.create_task(until_whole({process.name for process in victims.processes}))
    await asyncio.wait_for(asyncio.gather(*runs), LIMIT_S)
    whole_s, starting_s = await asyncio.wait_for(whole, LIMIT_S)
    after = await stats_of(spared)
    for stream in streams:
        await stream.client.close()
    at_dead = {process.short for process in victims.processes}
    failed = [stream for stream in streams if stream.error is not None]
    for stream in failed[:2]:
        print(f"{name}: {type(stream.error).__name__}: {stream.error}", flush=True)
    counts = {
        "on the replica": sum(r.running for r in before[0].replicas if r.replica_id in at_dead),
        "at the gateway": sum(stream.gateway in dying for stream in streams),
        "carried on by a gateway": sum(
            a.gateway_retries - b.gateway_retries for a, b in zip(after, before, strict=True)
        ),
        "carried on by the client": sum(s.gateway in dying and s.error is None for s in streams),
        "UNAVAILABLE with a hint": sum(
            isinstance(s.error, ReplicaDied) and s.error.retry_s > 0 for s in failed
        ),
        "wrong": sum(stream.wrong(right) for stream in streams),
        "wrong where nothing died": sum(
            s.wrong(right) for s in streams if s.error is None and s.gateway not in dying
        ),
    }
    return [
        *(Row(name, what, n, "", f"of {STREAMS} streams", n / STREAMS) for what, n in counts.items()),
        Row(name, "whole again", whole_s, "s", "15 s", whole_s / 15),
        Row(
            name,
            "whole again, without starting",
            whole_s - starting_s,
            "s",
            "15 s",
            (whole_s - starting_s) / 15,
        ),
    ]


async def until_whole(dead: set[str]) -> tuple[float, float]:
    """Seconds until all runs and answers, and those of them in which Serve waited for new processes."""
    began = looked = time.monotonic()
    starting_s = 0.0
    while True:
        details = await asyncio.to_thread(serve_details)
        states = {
            name: Counter(r["state"] for r in deployment["replicas"] if r["actor_name"] not in dead)
            for name, deployment in details.items()
        }
        now = time.monotonic()
        if any(count["STARTING"] for count in states.values()):
            starting_s += now - looked
        looked = now
        all_run = states["Replica"]["RUNNING"] == REPLICAS and states["Gateway"]["RUNNING"] == GATEWAYS
        if all_run and await all_answer():
            return time.monotonic() - began, starting_s
        await asyncio.sleep(LOOK_S)


async def all_answer() -> bool:
    found = await asyncio.to_thread(addresses, APP)
    if len(found) != GATEWAYS:
        return False
    for address in found:
        async with AsyncClient(address) as client:
            try:
                await collect_async(client.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=1)))
            except ReplicaDied:
                return False
    return True


async def run(raylets: Mapping[str, int]) -> list[Row]:
    right = await right_answers()
    rows = await fault("gateway", one_of("Gateway"), right)
    rows += await fault("replica", one_of("Replica"), right)
    return rows + await fault("worker node", node_of(raylets), right)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with world() as raylets:
        rolled_out(CONFIG, APP, lambda words: None)
        rows = asyncio.run(run(raylets))
    report(rows, None)
    if args.json:
        merge(rows, args.json)
    return any(row.value for row in rows if row.metric.startswith("wrong"))


if __name__ == "__main__":
    sys.exit(main())
