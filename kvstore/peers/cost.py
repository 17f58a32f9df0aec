"""Fetch or recompute: whichever is predicted to be faster, from rates measured here and nothing else.

Pure: observations and times are passed in. There are no guessed constants, so before the first measurement
there is nothing to compare. The rule then is to try: a link that was never used is measured by one fetch (one
at a time), and again after a while if it was too slow, because a fetch that disappoints costs at most one
deadline, and a link that is never tried would never be used. Before the first prefill was measured,
recomputing is tried, which measures that; and again after a while in which everything was fetched, the later
the more it is predicted to cost. `docs/decisions/0005` says more.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum

from quire.kvstore.peers.ids import ReplicaId


class Choice(StrEnum):
    FETCH = "fetch"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostConfig:
    """How measurements age and how firmly a choice is kept. None of it is a rate."""

    memory: float = 16.0
    """Observations of a link that count: each new one weighs 1 / memory, the first ones more."""
    hysteresis: float = 0.05
    """A choice between the same peers changes when the other one is faster by this share."""
    retry_s: float = 10.0
    """A link that failed is not tried again before."""
    refresh_s: float = 60.0
    """A link that seemed too slow is measured again after this time without a fetch, prefill after this time
    without a full step, as where everything is fetched."""
    exploring: float = 0.01
    """Share of the time that computing what could be fetched faster, to measure prefill, may cost."""
    max_links: int = 4096
    """Peers remembered; the one not used for longest is forgotten."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen, and on what grounds. None: not known yet."""

    choice: Choice
    fetch_s: float | None
    recompute_s: float | None
    explores: bool = False
    """The choice was made to measure, not because it is known to be better."""


@dataclass(slots=True)
class CostStats:
    """For the metrics."""

    fetches: int = 0
    recomputes: int = 0
    explorations: int = 0
    regrets: int = 0
    """Decisions whose outcome was worse than the other choice was predicted to be."""
    regret_s: float = 0.0
    """By how much, summed."""


class Average:
    """Exponentially weighted mean: exact over the first `memory` values, then forgetting."""

    def __init__(self, memory: float) -> None:
        self._memory, self._count, self.value = memory, 0, math.nan

    @property
    def known(self) -> bool:
        return self._count > 0

    def add(self, value: float) -> None:
        self._count += 1
        weight = 1 / min(self._count, self._memory)
        self.value = value if self._count == 1 else self.value + weight * (value - self.value)


class _Line:
    """seconds = latency + bytes / rate, by weighted least squares over what was observed."""

    def __init__(self, memory: float) -> None:
        self._x, self._y, self._xx, self._xy = (Average(memory) for _ in range(4))

    @property
    def known(self) -> bool:
        return self._x.known

    def add(self, size_bytes: float, seconds: float) -> None:
        self._x.add(size_bytes)
        self._y.add(seconds)
        self._xx.add(size_bytes * size_bytes)
        self._xy.add(size_bytes * seconds)

    def seconds(self, size_bytes: float) -> float:
        latency, pace = self.line
        return latency + pace * size_bytes

    @property
    def line(self) -> tuple[float, float]:
        """Latency and seconds per byte, neither negative. Sizes that hardly differ tell the latter alone."""
        x, y = self._x.value, self._y.value
        spread = self._xx.value - x * x
        pace = y / x
        if spread > 0.01 * x * x:
            pace = min(max((self._xy.value - x * y) / spread, 0.0), pace)
        return max(y - pace * x, 0.0), pace


class PrefillPace:
    """seconds a token = base + slope * tokens before it, which attention reads.

    Least squares in which a step weighs, and makes forgotten, as much as its tokens are: what fetches leave
    to compute are steps of a few tokens, whose rate says little about full ones.
    """

    def __init__(self, memory: float = 64.0) -> None:
        """`memory`: how many full steps count."""
        self._memory, self._most = memory, 0
        self._tokens = self._x = self._y = self._xx = self._xy = self._rates = 0.0

    @property
    def known(self) -> bool:
        return self._tokens > 0

    def full(self, tokens: int) -> bool:
        """Whether a step of this many tokens says much."""
        return 2 * tokens >= self._most

    def add(self, tokens: int, seconds: float, before: float) -> None:
        """`before`: the mean over the step's tokens."""
        self._most = max(self._most, tokens)
        kept = 1 - tokens / self._most / self._memory
        self._tokens = kept * self._tokens + tokens
        self._x = kept * self._x + tokens * before
        self._y = kept * self._y + seconds
        self._xx = kept * self._xx + tokens * before * before
        self._xy = kept * self._xy + seconds * before
        self._rates = kept * self._rates + tokens * tokens / seconds

    @property
    def tokens_s(self) -> float | None:
        """Prompt tokens a second in the steps that computed many; None before the first."""
        return self._rates / self._tokens if self.known else None

    def pace(self, before: float) -> float:
        """Seconds a token."""
        base, slope = self.line
        return base + slope * before

    @property
    def line(self) -> tuple[float, float]:
        """Base and slope. Neither is negative; like places tell no slope."""
        x, y = self._x / self._tokens, self._y / self._tokens
        spread = self._xx / self._tokens - x * x
        slope = 0.0
        if spread > 0.01 * x * x:
            slope = min(max((self._xy / self._tokens - x * y) / spread, 0.0), y / x)
        return y - slope * x, slope


@dataclass(slots=True)
class _Link:
    line: _Line
    choice: Choice | None = None
    trying: bool = False
    failed_s: float = -math.inf
    measured_s: float = -math.inf


class CostModel:
    """Of one replica: one line for prefill, and one for every link it has used."""

    def __init__(self, config: CostConfig | None = None) -> None:
        self.stats = CostStats()
        self._config = config or CostConfig()
        self.prefill = PrefillPace()
        self._prefilled_s = -math.inf
        self._all_links = _Line(self._config.memory)
        self._links: OrderedDict[ReplicaId, _Link] = OrderedDict()

    @property
    def fetch_line(self) -> tuple[float, float] | None:
        """Seconds of a fetch before its first byte, and for each byte; over all links. None: no fetch yet."""
        return self._all_links.line if self._all_links.known else None

    def prefilled(self, tokens: int, seconds: float, now_s: float, before: float = 0.0) -> None:
        """A step computed this many prompt tokens in this time (all of it: others share it later, too).

        `before`: tokens before each of them, on average.
        """
        if tokens > 0 and seconds > 0:
            if self.prefill.full(tokens):
                self._prefilled_s = now_s
            self.prefill.add(tokens, seconds, before)

    def fetched(
        self, owner: ReplicaId, size_bytes: int, seconds: float, now_s: float, decision: Decision
    ) -> None:
        """A fetch succeeded."""
        link = self._link(owner)
        link.trying, link.measured_s = False, now_s
        link.line.add(size_bytes, seconds)
        self._all_links.add(size_bytes, seconds)
        self._regret(seconds, decision.recompute_s)

    def failed(self, owner: ReplicaId, seconds: float, now_s: float, decision: Decision) -> None:
        """A fetch failed after this time; the tokens are computed after all."""
        link = self._link(owner)
        link.trying, link.failed_s = False, now_s
        self._regret(seconds, 0.0 if decision.recompute_s is not None else None)

    def not_tried(self, owner: ReplicaId) -> None:
        """The fetch that was chosen could not be begun."""
        self._link(owner).trying = False

    def recomputed(self, seconds: float, decision: Decision) -> None:
        """Tokens that another replica held were computed, in this time."""
        self._regret(seconds, decision.fetch_s)

    def decide(
        self,
        owner: ReplicaId,
        size_bytes: int,
        tokens: int,
        queued_tokens: int,
        now_s: float,
        before: int = 0,
    ) -> Decision:
        """For `tokens` tokens whose pages are `size_bytes` at `owner`, behind `queued_tokens` of prefill.

        A fetch runs beside the queue, a recomputation waits for it. `before`: tokens of the same prompt that
        are here.
        """
        link = self._link(owner)
        fetch_s = link.line.seconds(size_bytes) if link.line.known else None
        recompute_s = None
        if self.prefill.known:
            recompute_s = (queued_tokens + tokens) * self.prefill.pace(before + tokens / 2)
        explores = False
        if link.trying or now_s - link.failed_s < self._config.retry_s or recompute_s is None:
            choice = Choice.RECOMPUTE
        elif fetch_s is None:
            choice, explores, link.trying = Choice.FETCH, True, True
        else:
            choice = self._compare(link, fetch_s, recompute_s)
            if choice is Choice.RECOMPUTE and now_s - link.measured_s > self._config.refresh_s:
                choice, explores, link.trying = Choice.FETCH, True, True
        link.choice = choice if fetch_s is not None else None
        if choice is Choice.FETCH and not explores and self._prefill_is_old(fetch_s, recompute_s, now_s):
            choice, explores, self._prefilled_s = Choice.RECOMPUTE, True, now_s  # a short prompt counts, too
        self.stats.fetches += choice is Choice.FETCH
        self.stats.recomputes += choice is Choice.RECOMPUTE
        self.stats.explorations += explores
        return Decision(choice, fetch_s, recompute_s, explores)

    def _prefill_is_old(self, fetch_s: float | None, recompute_s: float | None, now_s: float) -> bool:
        """So that measuring it again is worth what it is predicted to cost."""
        if fetch_s is None or recompute_s is None:
            return False
        cost_s = recompute_s - fetch_s
        pause_s = max(self._config.refresh_s, cost_s / self._config.exploring)
        return now_s - self._prefilled_s > pause_s

    def _compare(self, link: _Link, fetch_s: float, recompute_s: float) -> Choice:
        margin = 1 + self._config.hysteresis
        if link.choice is Choice.FETCH:
            return Choice.FETCH if fetch_s < recompute_s * margin else Choice.RECOMPUTE
        if link.choice is Choice.RECOMPUTE:
            return Choice.FETCH if fetch_s * margin < recompute_s else Choice.RECOMPUTE
        return Choice.FETCH if fetch_s < recompute_s else Choice.RECOMPUTE

    def _link(self, owner: ReplicaId) -> _Link:
        link = self._links.get(owner)
        if link is None:
            link = self._links[owner] = _Link(_Line(self._config.memory))
            if len(self._links) > self._config.max_links:
                self._links.popitem(last=False)
        self._links.move_to_end(owner)
        return link

    def _regret(self, seconds: float, other_s: float | None) -> None:
        if other_s is not None and seconds > other_s:
            self.stats.regrets += 1
            self.stats.regret_s += seconds - other_s
