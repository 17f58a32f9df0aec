"""`routing.py` without a cluster or a clock: our real `ReplicaTable`, simulated replicas.

    PYTHONPATH=src:benchmarks python benchmarks/routing_simulated.py WORKLOAD... [--per-s 6] [--json FILE]

For what one noisy run of minutes cannot tell: what the weights of the score are worth, over many seeds. A
replica is a pool of pages that forgets the least recently used, and steps that take a fixed time, and more
for each prompt token and each running sequence (as the demo model on 0.4 cores). Loads and reservations take
no time on their way. `default` is the less busy of two drawn, by exact counts.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import mean

from routing_workloads import WORKLOADS, Workload
from rows import Row, report

from quire.cluster.routing.replica_table import ReplicaTable, RoutedRequest
from quire.cluster.routing.score import Reason, Weights
from quire.kvstore.books.keys import BlockKey, KeySpace, extend_chain
from quire.kvstore.peers.cost import Average, PrefillPace
from quire.replicas.engine.load_report import LoadReport

REPLICAS, PAGES, PAGE_TOKENS, MAX_RUNNING, STEP_TOKENS, NEW_TOKENS = 3, 58, 64, 16, 512, 12
STEP_S, PROMPT_TOKEN_S, SEQUENCE_S = 0.036, 0.00075, 0.003
BEFORE_TOKENS = 4000
"""After this many tokens of context, a prompt's token costs twice as much."""
KEYS = KeySpace(b"layout", b"weights", b"transforms")
ROUNDS, ROUND_S = 2, 200.0
WEIGHTS = {
    "default": None,
    "ours": Weights(),
    "delay at 0": Weights(delay=0.0),
    "delay at 1": Weights(delay=1.0),
}


@dataclass(eq=False)
class Asked:
    """A request, and how far it is."""

    prompt: list[int]
    at_s: float
    route: RoutedRequest | None = None
    held: list[BlockKey] = field(default_factory=list)
    """Pages that it reads."""
    own_pages: int = 0
    """Blocks that no other request can find yet."""
    cached: int = 0
    done: int = 0
    """Tokens of the prompt."""
    answered: int = 0
    admitted_s: float = 0.0

    def __post_init__(self) -> None:
        found = (len(self.prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
        self.chain = extend_chain(KEYS.root(), self.prompt[:found], PAGE_TOKENS)

    @property
    def left(self) -> int:
        return len(self.prompt) - self.done


class Replica:
    """Its pool, its queue and its steps; `busy` while one is under way."""

    def __init__(self) -> None:
        self.waiting: list[Asked] = []
        self.running: list[Asked] = []
        self.busy = False
        self.taken = 0
        self._cached: OrderedDict[BlockKey, None] = OrderedDict()
        self._readers: Counter[BlockKey] = Counter()
        self._decoding: list[Asked] = []
        self._computed: list[tuple[Asked, int]] = []
        """Prompts of the step under way, and tokens of each."""
        self._took_s = 0.0
        self._prefill, self._step, self._hold = PrefillPace(), Average(32.0), Average(64.0)

    def load(self) -> LoadReport:
        prefill_s, prefill_s_before = self._prefill.line if self._prefill.known else (0.0, 0.0)
        queued = sum(asked.left for asked in self.running)
        queued += sum(len(a.prompt) - self._match(a) * PAGE_TOKENS for a in self.waiting)
        return LoadReport(
            taken=self.taken,
            queued_tokens=queued,
            running=len(self.running),
            waiting=len(self.waiting),
            max_running=MAX_RUNNING,
            pages_total=PAGES,
            pages_free=self._free(),
            pages_cached=len(self._unread()),
            prefill_s_per_token=prefill_s,
            prefill_s_per_token_before=prefill_s_before,
            step_s=self._step.value if self._step.known else 0.0,
            hold_s=self._hold.value if self._hold.known else 0.0,
        )

    def begin_step(self, now_s: float) -> float | None:
        """Seconds that it takes; None: nothing to do."""
        while self.waiting and len(self.running) < MAX_RUNNING and self._admit(self.waiting[0], now_s):
            self.running.append(self.waiting.pop(0))
        self.busy = bool(self.running)
        if not self.busy:
            return None
        self._decoding = [asked for asked in self.running if not asked.left]
        self._computed, budget = [], STEP_TOKENS - len(self._decoding)
        for asked in self.running:
            if asked.left and budget:
                tokens = min(asked.left, budget)
                self._computed.append((asked, tokens))
                budget -= tokens
        self._took_s = STEP_S + SEQUENCE_S * len(self._decoding)
        self._took_s += sum(PROMPT_TOKEN_S * n * (1 + a.done / BEFORE_TOKENS) for a, n in self._computed)
        return self._took_s

    def end_step(self, now_s: float) -> tuple[list[Asked], list[Asked]]:
        """Those that got their first token, and those that got their last one."""
        if tokens := sum(n for _, n in self._computed):
            before = sum(n * a.done for a, n in self._computed) / tokens
            self._step.add(self._took_s)
            self._prefill.add(tokens, self._took_s, before)
        for asked, tokens in self._computed:
            asked.done += tokens
        first = [asked for asked, _ in self._computed if not asked.left]
        for asked in first:
            self._publish(asked)
        for asked in (*first, *self._decoding):
            asked.answered += 1
        last = [asked for asked in self._decoding if asked.answered == NEW_TOKENS]
        for asked in last:
            self.running.remove(asked)
            self._readers.subtract(asked.held)
            for key in reversed(asked.chain):
                if key in self._cached:
                    self._cached.move_to_end(key)
            self._hold.add(now_s - asked.admitted_s)
        return first, last

    def _admit(self, asked: Asked, now_s: float) -> bool:
        held = asked.chain[: self._match(asked)]
        need = -(-(len(asked.prompt) + NEW_TOKENS) // PAGE_TOKENS) - len(held)
        unread = [key for key in self._unread() if key not in held]
        lacking = max(need - self._free(), 0)
        if lacking > len(unread):
            return False
        for key in unread[:lacking]:
            del self._cached[key]
        asked.held, asked.own_pages, asked.admitted_s = held, need, now_s
        asked.cached = asked.done = len(held) * PAGE_TOKENS
        self._readers.update(held)
        return True

    def _publish(self, asked: Asked) -> None:
        new = [key for key in asked.chain[len(asked.held) :] if key not in self._cached]
        self._cached.update(dict.fromkeys(new))
        self._readers.update(new)
        asked.held = [*asked.held, *new]
        asked.own_pages -= len(new)

    def _match(self, asked: Asked) -> int:
        return next((n for n, key in enumerate(asked.chain) if key not in self._cached), len(asked.chain))

    def _free(self) -> int:
        return PAGES - len(self._cached) - sum(asked.own_pages for asked in self.running)

    def _unread(self) -> list[BlockKey]:
        return [key for key in self._cached if not self._readers[key]]


class Simulation:
    """Replicas, one gateway, and what happens when."""

    def __init__(self, weights: Weights | None, seed: int) -> None:
        """Without weights: the default router."""
        self._now_s, self._order = 0.0, count()
        self._random = random.Random(seed)
        self._table = ReplicaTable(clock=lambda: self._now_s, seed=seed, weights=weights) if weights else None
        self._replicas = {f"replica {n}": Replica() for n in range(REPLICAS)}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self.first_s: list[float] = []
        self.prompt_tokens = self.cached_tokens = 0
        if self._table:
            for name in self._replicas:
                self._table.connected(name, KEYS, PAGE_TOKENS)

    def at(self, time_s: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happens))

    def run(self) -> None:
        while self._events:
            self._now_s, _, happens = heapq.heappop(self._events)
            happens()

    def ask(self, prompt: list[int], name: str | None = None) -> None:
        """`name`: of the replica that is to warm up with it."""
        asked = Asked(prompt, self._now_s)
        if name is None:
            name = self._route(asked) if self._table else self._of_two()
        replica = self._replicas[name]
        replica.waiting.append(asked)
        if not replica.busy:
            self._step(name)
        self._hear(name)

    @property
    def copies(self) -> int:
        return self._table.numbers().decisions[Reason.COPY] if self._table else 0

    def _route(self, asked: Asked) -> str:
        assert self._table
        for name, replica in self._replicas.items():
            if not replica.busy:  # which reports in quiet times as well
                self._hear(name)
        asked.route = RoutedRequest(asked.prompt)
        name = self._table.choose(asked.route)
        assert name
        self._replicas[name].taken += 1
        asked.route.call = self._replicas[name].taken
        return name

    def _of_two(self) -> str:
        busy = {name: len(r.running) + len(r.waiting) for name, r in self._replicas.items()}
        return min(self._random.sample(list(busy), 2), key=busy.__getitem__)

    def _step(self, name: str) -> None:
        took_s = self._replicas[name].begin_step(self._now_s)
        if took_s is not None:
            self.at(self._now_s + took_s, lambda: self._stepped(name))

    def _stepped(self, name: str) -> None:
        first, last = self._replicas[name].end_step(self._now_s)
        for asked in first:
            if asked.at_s >= ROUND_S:  # not one that warms up
                self.first_s.append(self._now_s - asked.at_s)
                self.prompt_tokens += len(asked.prompt)
                self.cached_tokens += asked.cached
            if self._table and asked.route:
                self._table.answered(asked.route)
        for asked in last:
            if self._table and asked.route:
                self._table.ended(asked.route)
        self._step(name)
        self._hear(name)

    def _hear(self, name: str) -> None:
        if self._table:
            replica = self._replicas[name]
            self._table.heard(name, replica.load(), replica.taken)


def simulate(workload: Workload, weights: Weights | None, seed: int) -> tuple[float, float, float, int]:
    """p50, p90 of the time to first token in ms, hit rate, and copies made."""
    simulation = Simulation(weights, seed)
    for number in range(4 * REPLICAS):
        name, prompt = f"replica {number % REPLICAS}", [7 + number] * 96
        simulation.at(0.15 * number, lambda name=name, prompt=prompt: simulation.ask(prompt, name))
    for number in range(ROUNDS):
        for arrival in workload.arrivals(ROUNDS * seed + number):
            due_s = (1 + number) * ROUND_S + arrival.at_s
            simulation.at(due_s, lambda prompt=arrival.prompt: simulation.ask(prompt))
    simulation.run()
    ordered = sorted(simulation.first_s)
    p50, p90 = (1e3 * ordered[int(len(ordered) * share)] for share in (0.5, 0.9))
    return p50, p90, simulation.cached_tokens / simulation.prompt_tokens, simulation.copies


def main() -> int:
    parser = argparse.ArgumentParser(description="What a constant of the router is worth.")
    parser.add_argument("workloads", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument("--per-s", type=float, default=6.0, help="requests a second")
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.workloads:
        workload, base = replace(WORKLOADS[name], per_s=args.per_s), 0.0
        for how, weights in WEIGHTS.items():
            runs = [simulate(workload, weights, seed) for seed in range(args.seeds)]
            p50, p90, hit_rate, copies = map(mean, zip(*runs, strict=True))
            base = base or p90
            case = f"{name} {args.per_s:g}/s, {how}"
            rows.append(Row(case, "first token p90", p90, "ms", "default", p90 / base))
            print(f"{case}: p50 {p50:.0f} ms, hit rate {hit_rate:.3f}, {copies:.1f} copies", flush=True)
    report(rows, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
