"""A load ramp 1 → N → 1 on a real Ray Serve application: do replicas follow, and who waits meanwhile?

    scripts/loopback env PYTHONPATH=src:tests/support python benchmarks/ramp.py [--json FILE]

Users of the demo model come one by one, stay, and leave one by one; each asks, reads the answer, thinks a
moment and asks again. A replica is limited to four sequences at once: its places, not the two cores that all
replicas of this machine share, are what it runs out of, as a GPU runs out of pages. So eight to ten users
fill three replicas, however slow the machine is.

Then the same number of users on a single replica, the baseline: what the peak costs without autoscaling.

Exits with 1 if a request failed, replicas did not follow, turned round more than once, or first tokens at the
peak, once the last replica has come, are later than the target.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from ray import serve
from recall import mixed_prompts
from rows import Row, report

from quire.cluster import AsyncClient, SamplingParams
from quire.cluster.autoscaling import AutoscalingConfig
from quire.cluster.autoscaling_policy import last_record
from quire.cluster.cli.ray_session import cluster
from quire.cluster.cli.rollout import APP, served
from quire.cluster.config import GatewayConfig, ReplicaConfig, ServeConfig
from quire.replicas.config import EngineConfig, PoolConfig, SchedulerConfig
from quire.replicas.engine.load import load_tokenizer
from quire.replicas.errors import QuireError

PLACES, MOST, PEAK_USERS = 4, 3, 9
FIRST_TOKEN_S = 1.0
SCALING = AutoscalingConfig(
    max=MOST,
    occupancy=0.8,
    first_token_s=FIRST_TOKEN_S,
    prefill_use=4.0,  # prompts are short, and the cores are every replica's
    prefill_queue_s=4.0,
    look_back_s=4.0,
    report_period_s=0.5,
    upscale_delay_s=1.0,
    downscale_delay_s=6.0,
)
CONFIG = ServeConfig(
    engine=EngineConfig(
        model="demo",
        kv="int8",
        threads_per_shard=1,
        shard_timeout_s=30.0,
        pool=PoolConfig(bytes=32 << 20),
        scheduler=SchedulerConfig(max_running=PLACES, max_queued=64),
    ),
    gateway=GatewayConfig(port=0, cpus=0.1),
    replicas=ReplicaConfig(
        autoscaling=SCALING, cpus_per_shard=0.1, graceful_shutdown_s=60.0, health_check_timeout_s=30.0
    ),
)
JOIN_EVERY_S, STAY_S, LEAVE_EVERY_S, LAST_S, BASELINE_S = 4.0, 24.0, 3.0, 30.0, 24.0
SETTLE_S = 2.0
"""For the queue that had formed on the others."""
START_WITHIN_S = 90.0
"""How long all users wait at most for the last replica; it takes a busy machine long to start one."""
THINK_S = 0.2
BIN_S = 4.0
SAMPLING = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, in seconds since the start."""

    at_s: float
    first_token_s: float | None
    """None: it failed."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the application."""

    at_s: float
    users: int
    running: int
    target: int


@dataclass(slots=True)
class Course:
    """What happened."""

    asked: list[Asked] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    leave_s: float = 0.0
    """When the first user leaves."""

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    def first_tokens(self, since_s: float, until_s: float) -> list[float]:
        """Of the requests asked in this time that did not fail."""
        return [
            a.first_token_s for a in self.asked if a.first_token_s is not None and since_s <= a.at_s < until_s
        ]

    @property
    def reversals(self) -> int:
        """How often the number of replicas that is aimed at turned round."""
        targets = [seen.target for seen in self.seen]
        steps = [1 if b > a else -1 for a, b in pairwise(targets) if a != b]
        return sum(a != b for a, b in pairwise(steps))


class Crowd:
    """Users who ask until they are sent home."""

    def __init__(self, client: AsyncClient, course: Course) -> None:
        self._client, self._course = client, course
        self._prompts = mixed_prompts(load_tokenizer("demo"), list(range(90, 150)))
        self._rng = random.Random(3)
        self._staying: list[asyncio.Event] = []
        self._tasks: list[asyncio.Task[None]] = []

    def __len__(self) -> int:
        return len(self._staying)

    def join(self) -> None:
        self._staying.append(asyncio.Event())
        self._tasks.append(asyncio.create_task(self._ask_on(self._staying[-1])))

    def leave(self) -> None:
        """One user reads the answer under way to its end, and goes."""
        self._staying.pop().set()

    async def gone(self) -> None:
        await asyncio.gather(*self._tasks)

    async def _ask_on(self, leaves: asyncio.Event) -> None:
        while not leaves.is_set():
            await self._ask(self._rng.choice(self._prompts))
            with suppress(TimeoutError):
                await asyncio.wait_for(leaves.wait(), self._rng.expovariate(1 / THINK_S))

    async def _ask(self, prompt: list[int]) -> None:
        at_s, first_token_s = self._course.now_s, None
        try:
            async for _ in self._client.generate(prompt, SAMPLING):
                first_token_s = first_token_s or self._course.now_s - at_s
        except QuireError as error:
            print(f"failed at {at_s:.1f} s: {error}", file=sys.stderr)
            first_token_s = None
        self._course.asked.append(Asked(at_s, first_token_s))


async def watch(course: Course, crowd: Crowd, every_s: float = 0.5) -> None:
    """Until cancelled: note the replicas, and say why their number changes."""
    target = 0
    while True:
        states = await asyncio.to_thread(lambda: serve.status().applications[APP].deployments["Replica"])
        running = sum(
            n for state, n in states.replica_states.items() if getattr(state, "value", state) == "RUNNING"
        )
        record = await asyncio.to_thread(last_record, APP)
        now = record.target if record else running
        if now != target:
            print(f"{course.now_s:6.1f} s: {len(crowd)} users, {target} → {now} replicas", end="; ")
            print(record.reasons[0] if record else "fixed", flush=True)
            target = now
        course.seen.append(Seen(course.now_s, len(crowd), running, now))
        await asyncio.sleep(every_s)


async def ramp(address: str) -> Course:
    """The course with autoscaling."""
    async with AsyncClient(address) as client:
        course = Course()
        crowd = Crowd(client, course)
        watching = asyncio.create_task(watch(course, crowd))
        crowd.join()
        for _ in range(PEAK_USERS - 1):
            await asyncio.sleep(JOIN_EVERY_S)
            crowd.join()
        with suppress(TimeoutError):
            async with asyncio.timeout(START_WITHIN_S):
                while course.seen[-1].running < MOST:
                    await asyncio.sleep(0.5)
        await asyncio.sleep(SETTLE_S + STAY_S)
        course.leave_s = course.now_s
        for _ in range(PEAK_USERS - 1):
            crowd.leave()
            await asyncio.sleep(LEAVE_EVERY_S)
        await asyncio.sleep(LAST_S)
        crowd.leave()
        await crowd.gone()
        watching.cancel()
        return course


async def peak(address: str) -> Course:
    """All users at once, for a while, on what there is."""
    async with AsyncClient(address) as client:
        course = Course()
        crowd = Crowd(client, course)
        for _ in range(PEAK_USERS):
            crowd.join()
        await asyncio.sleep(BASELINE_S)
        for _ in range(PEAK_USERS):
            crowd.leave()
        await crowd.gone()
        return course


def settled(course: Course) -> tuple[float, float]:
    """From when all users and replicas have been there for a moment, until users begin to leave."""
    came_s = next((s.at_s for s in course.seen if s.running == MOST), float("inf"))
    return max(came_s, (PEAK_USERS - 1) * JOIN_EVERY_S) + SETTLE_S, course.leave_s


def percentile_90(values: list[float]) -> float:
    return sorted(values)[-(-9 * len(values) // 10) - 1] if values else float("nan")


def rows_of(course: Course, alone: Course) -> list[Row]:
    (since_s, until_s), joined_s = settled(course), (PEAK_USERS - 1) * JOIN_EVERY_S
    held, all_ = percentile_90(course.first_tokens(since_s, until_s)), [a.first_token_s for a in course.asked]
    single = percentile_90(alone.first_tokens(4.0, BASELINE_S))
    failed = sum(first is None for first in all_)
    target, one = "target", "one replica"
    rows = [
        Row("ramp settled peak", "first token p90", held, "s", one, held / single),
        Row("ramp settled peak", "first token p90 of target", held, "s", target, held / FIRST_TOKEN_S),
        Row("ramp one replica", "first token p90 of target", single, "s", target, single / FIRST_TOKEN_S),
        Row("ramp", "requests", len(all_), "", "requests", 1.0),
        Row("ramp", "failed", failed, "", "requests", failed / len(all_)),
        Row("ramp", "reversals", course.reversals, "", "allowed", course.reversals / 1),
        Row("ramp", "all replicas after the last user came", since_s - joined_s, "s", "s", 1.0),
    ]
    for number in range(int(course.seen[-1].at_s // BIN_S)):
        begin_s = number * BIN_S
        inside = [s for s in course.seen if begin_s <= s.at_s < begin_s + BIN_S]
        case = f"ramp at {begin_s:.0f} s"
        if not inside:
            continue
        last = inside[-1]
        rows.append(Row(case, "users", last.users, "", "places of a replica", last.users / PLACES))
        rows.append(Row(case, "replicas", last.running, "", "most", last.running / MOST))
        if first := course.first_tokens(begin_s, begin_s + BIN_S):
            late = percentile_90(first)
            rows.append(Row(case, "first token p90 of target", late, "s", target, late / FIRST_TOKEN_S))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    fixed = replace(CONFIG, replicas=replace(CONFIG.replicas, autoscaling=None, count=1))
    with cluster(CONFIG, None):
        with served(CONFIG, lambda words: None) as port:
            course = asyncio.run(ramp(f"127.0.0.1:{port}"))
        with served(fixed, lambda words: None) as port:
            alone = asyncio.run(peak(f"127.0.0.1:{port}"))
    rows = rows_of(course, alone)
    report(rows, args.json)
    running = [seen.running for seen in course.seen]
    held = next(row for row in rows if row.metric == "first token p90 of target").ratio <= 1
    followed = max(running) == MOST and running[0] == running[-1] == 1
    failed = any(asked.first_token_s is None for asked in course.asked + alone.asked)
    return 0 if held and followed and not failed and course.reversals <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
