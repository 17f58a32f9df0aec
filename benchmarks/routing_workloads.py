"""What the routing benchmark asks: prompts of random tokens, which share what real ones share, and when.

Everything follows from the seed. Arrivals are a Poisson process (exponential gaps); a conversation's earlier
answers are made up here, so that requests do not depend on how fast others were answered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_TOKENS = range(10, 4096)


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt: list[int]


@dataclass(frozen=True, slots=True)
class Workload:
    """`prompts` yields them in order of arrival, for ever."""

    prompts: Callable[[random.Random], Iterator[list[int]]]
    requests: int
    per_s: float

    def arrivals(self, seed: int) -> list[Arrival]:
        rng = random.Random(f"routing {seed}")
        prompts, at_s, arrivals = self.prompts(rng), 0.0, []
        for _ in range(self.requests):
            at_s += rng.expovariate(self.per_s)
            arrivals.append(Arrival(at_s, next(prompts)))
        return arrivals


def _words(rng: random.Random, count: int) -> list[int]:
    return rng.choices(_TOKENS, k=count)


def _weighted(rng: random.Random, count: int) -> int:
    """The first is asked for twice as often as the second, three times as often as the third, ..."""
    return rng.choices(range(count), [1 / (at + 1) for at in range(count)])[0]


def chat(rng: random.Random, at_once: int = 12) -> Iterator[list[int]]:
    """12 conversations at a time, 4 turns each, over 6 system prompts of 448 tokens; a turn adds 60-140."""
    systems = [_words(rng, 448) for _ in range(6)]

    def begin() -> tuple[list[int], int]:
        return list(systems[_weighted(rng, len(systems))]), 4

    open_ = [begin() for _ in range(at_once)]
    while True:
        at = rng.randrange(len(open_))
        said, left = open_[at]
        said = said + _words(rng, rng.randrange(40, 90))
        yield said
        said = said + _words(rng, rng.randrange(20, 50))
        open_[at] = (said, left - 1) if left > 1 else begin()


def crowd(rng: random.Random) -> Iterator[list[int]]:
    """Chats, but 48 at a time: more than the pools of all replicas hold."""
    return chat(rng, at_once=48)


def agent(rng: random.Random, kinds: int = 6) -> Iterator[list[int]]:
    """6 tool descriptions of 960 tokens, each under tails of 20 to 120 tokens."""
    tools = [_words(rng, 960) for _ in range(kinds)]
    while True:
        yield tools[_weighted(rng, len(tools))] + _words(rng, rng.randrange(20, 120))


def agents(rng: random.Random) -> Iterator[list[int]]:
    """16 tool descriptions: more than the pools of all replicas hold."""
    return agent(rng, kinds=16)


def hot(rng: random.Random) -> Iterator[list[int]]:
    """One prefix of 512 tokens, under tails of 20 to 120 tokens."""
    prefix = _words(rng, 512)
    while True:
        yield prefix + _words(rng, rng.randrange(20, 120))


WORKLOADS = {
    "chat": Workload(chat, requests=240, per_s=8.0),
    "crowd": Workload(crowd, requests=240, per_s=8.0),
    "agent": Workload(agent, requests=200, per_s=6.0),
    "agents": Workload(agents, requests=200, per_s=6.0),
    "hot": Workload(hot, requests=200, per_s=10.0),
}
