"""How many replicas there should be, and why. Pure: figures in, a number with its reasons out.

Knows no Ray (`autoscaling_policy.py`) and no time: looking back and waiting before a change are Serve's.

Loads add up over replicas, so each asks for a number of replicas whatever number there is now: the sum over
what one replica is meant to carry. More are started when a load asks for more at its target; fewer remain
only when all loads would still leave `margin` of it free there. In between nothing changes.
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
    """Between which numbers replicas are scaled, and what one replica is meant to carry."""

    max: Count
    """Replicas at most."""
    min: Annotated[int, Meta(ge=0)] = 1
    """Replicas at least. 0: none while there are no requests; the next one waits for a replica to load."""
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
    """Figures are averaged over this time."""
    report_period_s: Positive = 1.0
    """How often replicas report them."""
    upscale_delay_s: NotNegative = 5.0
    """How long more replicas must be wanted before they are started."""
    downscale_delay_s: NotNegative = 60.0
    """How long fewer must be wanted before one is taken down."""
    downscale_to_zero_delay_s: NotNegative = 600.0
    """The same for the last one, where min is 0."""

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
    """The fleet at one moment."""

    running: int
    """Replicas that answer."""
    target: int
    """How many Serve is bringing about."""
    waiting: float
    """Requests at gateways that no replica has taken. Counts only while none runs: what is too much for those
    that do, they queue or refuse, and that shows in their pressure."""
    pressures: tuple[Pressure, ...]
    """Of the replicas that have reported; the others are new."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas are wanted. `reasons`: the load that asked for most first."""

    replicas: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Need:
    replicas: float
    """That would carry the load at its target, not rounded."""
    said: str


def decide(seen: Observed, config: AutoscalingConfig) -> Decision:
    """Monotone: more load of any kind never asks for fewer replicas."""
    if seen.running == 0:
        return _without_replicas(seen, config)
    if not seen.pressures:
        return _bounded(seen.target, ("no replica has reported yet",), config)
    needs = sorted(_needs(seen.pressures, config), key=lambda need: -need.replicas)
    up = _whole(needs[0].replicas)
    down = _whole(needs[0].replicas / (1 - config.margin))
    reasons = [need.said for need in needs]
    if len(seen.pressures) < seen.running:  # what the silent ones carry is not known
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
    """Those that are starting are waited for: taken down now, they would never come up for anybody."""
    if seen.waiting > 0:
        return _bounded(max(seen.target, 1), ("requests wait and no replica runs",), config)
    return _bounded(seen.target, ("no replica runs and nobody asks",), config)


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
        reasons = (*reasons, f"{replicas} lies outside {config.min}..{config.max}")
    return Decision(bounded, reasons)
