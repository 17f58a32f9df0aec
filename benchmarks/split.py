"""Prefill/decode split: what long prompts cost the streams that decode beside them, and wait themselves.

    scripts/loopback env PYTHONPATH=src:benchmarks python benchmarks/split.py [--json FILE]

Real Ray Serve, the demo model, two replicas of one thread each, so that each has a core: `split`, one that
decodes and one that only computes long prompts; `whole`, two that do both. Eight streams decode while prompts
of 1,900 tokens, none like another, come one after another. In `whole` a prompt lengthens the steps of the
streams beside it; in `split` its blocks cross a link instead.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from ray import serve
from rows import Row, alternate, merge, report

from quire.cluster import AsyncClient, SamplingParams
from quire.cluster.app import application
from quire.cluster.cli.ray_session import cluster
from quire.cluster.config import GatewayConfig, PrefillConfig, ReplicaConfig, ServeConfig
from quire.replicas.config import EngineConfig, PoolConfig

STREAMS, STREAM_TOKENS = 8, 250
PROMPTS, PROMPT_TOKENS, PAUSE_S = 6, 1900, 0.3
WHOLE = ServeConfig(
    engine=EngineConfig(
        model="demo", kv="int8", device="cpu", threads_per_shard=1, pool=PoolConfig(bytes=32 << 20)
    ),
    gateway=GatewayConfig(port=0, cpus=0.05),
    replicas=ReplicaConfig(count=2, cpus_per_shard=0.05, graceful_shutdown_s=1),
)
SPLIT = replace(
    WHOLE,
    replicas=replace(WHOLE.replicas, count=1),
    prefill=PrefillConfig(count=1, least_tokens=1024),
)


@contextmanager
def applications() -> Iterator[dict[str, str]]:
    """The gateways' addresses."""
    addresses = {}
    try:
        for name, config in (("whole", WHOLE), ("split", SPLIT)):
            handle = serve.run(application(config), name=f"bench-{name}", route_prefix=None)
            addresses[name] = f"127.0.0.1:{handle.port.remote().result()}"
        yield addresses
    finally:
        for name in addresses:
            serve.delete(f"bench-{name}")


async def play(address: str, seed: int) -> tuple[list[float], list[float]]:
    """Seconds between two tokens of the streams while prompts came, and to the prompts' first tokens."""
    rng = random.Random(seed)
    gaps: list[float] = []
    firsts: list[float] = []
    busy = True

    def words(count: int) -> list[int]:
        return rng.choices(range(10, 4096), k=count)

    async with AsyncClient(address) as client:

        async def stream() -> None:
            sampling = SamplingParams(temperature=0, max_tokens=STREAM_TOKENS, ignore_eos=True)
            times = []
            async for delta in client.generate(words(16), sampling):
                if delta.token_ids and busy:
                    times.append(time.perf_counter())
            gaps.extend(after - before for before, after in pairwise(times))

        streams = [asyncio.create_task(stream()) for _ in range(STREAMS)]
        await asyncio.sleep(0.5)
        for _ in range(PROMPTS):
            began_s = time.perf_counter()
            async for _ in client.generate(words(PROMPT_TOKENS), SamplingParams(temperature=0, max_tokens=1)):
                pass
            firsts.append(time.perf_counter() - began_s)
            await asyncio.sleep(PAUSE_S)
        busy = False
        await asyncio.gather(*streams)
    return gaps, firsts


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    gaps: dict[str, list[float]] = {"whole": [], "split": []}
    firsts: dict[str, list[float]] = {"whole": [], "split": []}
    with cluster(WHOLE, None), applications() as addresses:
        for address in addresses.values():
            asyncio.run(play(address, -1))  # compiles, measures, opens links

        def once(name: str, number: int) -> float:
            gaps_s, firsts_s = asyncio.run(play(addresses[name], number))
            gaps[name] += gaps_s
            firsts[name] += firsts_s
            return 0.0

        alternate({name: lambda number, name=name: once(name, number) for name in addresses}, args.rounds)
    rows = []
    for name in ("whole", "split"):
        for metric, values, share in (
            ("inter-token p50", gaps, 0.5),
            ("inter-token p99", gaps, 0.99),
            ("prompt's first token p50", firsts, 0.5),
        ):
            at = {which: sorted(seen)[int(share * len(seen))] for which, seen in values.items()}
            rows.append(Row(f"split: {name}", metric, at[name] * 1e3, "ms", "whole", at[name] / at["whole"]))
    report(rows, None)
    if args.json:
        merge(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
