"""Decides how many replicas there should be, and why. Pure.

Knows no Ray (`autoscaling_policy.py`) and no time: Serve averages over time and delays changes.

Loads are summed over replicas, and each requires the sum divided by its target per replica. More replicas are
started when a load requires more; fewer are kept only when all loads would leave `margin` of their targets
free. In between nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from quire.replicas.config_decoder import Count, NotNegative, Positive
from quire.replicas.engine.pressure import Pressure
from quire.replicas.errors import ConfigError

_BUSY = 0.5
"""A late first token calls for another replica only where the fullest load is this near its target: a prompt
that takes long to compute by itself takes as long on any number of replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig:
    """The range of the number of replicas, and the targets of one replica."""

    max: Count
    """The most replicas."""
    min: Annotated[int, Meta(ge=0)] = 1
    """The fewest replicas. 0: none while there are no requests; the next one waits for a replica to load."""
    occupancy: Positive = 0.7
    """Share of a replica's KV pages (or of scheduler.max_running) that sequences hold or wait for."""
    prefill_queue_s: Positive = 1.0
    """Seconds of prefill that wait on a replica."""
    prefill_use: Positive = 0.8
    """Share of the prompt tokens a replica could compute that it does compute."""
    first_token_s: Positive = 2.0
    """Time to first token, 90th percentile. A busy replica that exceeds it gets another one beside it."""
    margin: Annotated[float, Meta(ge=0, lt=1)] = 0.3
    """Replicas are taken away only if every load then stays below its target by this share."""
    look_back_s: Positive = 10.0
    """Loads are averaged over this time."""
    report_period_s: Positive = 1.0
    """How often replicas report loads."""
    upscale_delay_s: NotNegative = 5.0
    """How long more replicas must be wanted before they are started."""
    downscale_delay_s: NotNegative = 60.0
    """How long fewer must be wanted before one is taken down."""
    downscale_to_zero_delay_s: NotNegative = 600.0
    """The same for the last replica, where min is 0."""

    def __post_init__(self) -> None:
        where = "replicas.autoscaling"
        if self.min > self.max:
            raise ConfigError(f"{where} needs min <= max, got min={self.min}, max={self.max}")
        if self.look_back_s <= self.report_period_s:
            raise ConfigError(
                f"{where}.look_back_s ({self.look_back_s}) must exceed report_period_s "
                f"({self.report_period_s}), or there is nothing to average"
            )


@dataclass(frozen=True, slots=True)
class Observed:
    """The replicas at one moment."""

    running: int
    """Number of replicas that run."""
    target: int
    """Number of replicas that Serve aims at."""
    waiting: float
    """Requests at gateways that no replica has taken. Counts only while none runs: what is too much for those
    that do, they queue or refuse, and that shows in their pressure."""
    pressures: tuple[Pressure, ...]
    """The pressures of the replicas that have reported; the others are new."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas are required. `reasons` begin with the load that requires the most."""

    replicas: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Need:
    replicas: float
    """Number of replicas, not rounded, that would carry the load at its target."""
    said: str


def decide(seen: Observed, config: AutoscalingConfig) -> Decision:
    """Decide how many replicas are required. Monotone: more load of any kind never requires fewer."""
    if seen.running == 0:
        return _without_replicas(seen, config)
    if not seen.pressures:
        return _bounded(seen.target, ("no replica has reported yet",), config)
    needs = sorted(_needs(seen.pressures, config), key=lambda need: -need.replicas)
    up = _whole(needs[0].replicas)
    down = _whole(needs[0].replicas / (1 - config.margin))
    reasons = [need.said for need in needs]
    if len(seen.pressures) < seen.running:  # the load of those is not known
        down = max(down, seen.target)
        reasons.append(f"{seen.running - len(seen.pressures)} replicas have not reported yet")
    first_token_s = max(p.first_token_s for p in seen.pressures)
    if needs[0].replicas >= _BUSY * seen.running:
        if first_token_s > config.first_token_s:
            up = max(up, seen.running + 1)
            reasons.insert(0, f"first tokens take {first_token_s:.2f} s, {config.first_token_s:g} wanted")
        elif first_token_s > config.first_token_s * (1 - config.margin):
            down = max(down, seen.running)
            reasons.append(f"first tokens take {first_token_s:.2f} s, near {config.first_token_s:g}")
    up = min(up, max(seen.target, 2 * seen.running))  # a queue says how much is late, not how long it lasts
    return _bounded(min(max(seen.target, up), max(up, down)), tuple(reasons), config)


def _without_replicas(seen: Observed, config: AutoscalingConfig) -> Decision:
    """Wait for replicas that are starting: stopping them now would restart them forever."""
    if seen.waiting > 0:
        return _bounded(max(seen.target, 1), ("requests wait and no replica runs",), config)
    return _bounded(seen.target, ("no replica runs and no request waits",), config)


def _needs(pressures: tuple[Pressure, ...], config: AutoscalingConfig) -> Iterable[_Need]:
    for name, words in (
        ("occupancy", "KV occupancy"),
        ("prefill_queue_s", "queued prefill in seconds"),
        ("prefill_use", "use of the prefill rate"),
    ):
        total, each = sum(getattr(p, name) for p in pressures), getattr(config, name)
        yield _Need(
            total / each, f"{words}: {total:.2f} in all, {each:g} a replica: {total / each:.2f} replicas"
        )


def _whole(replicas: float) -> int:
    return math.ceil(replicas - 1e-9)


def _bounded(replicas: int, reasons: tuple[str, ...], config: AutoscalingConfig) -> Decision:
    bounded = min(max(replicas, config.min), config.max)
    if bounded != replicas:
        reasons = (*reasons, f"{replicas} is outside {config.min}..{config.max}")
    return Decision(bounded, reasons)
