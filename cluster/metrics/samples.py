"""Converts counted numbers to the samples that replicas and gateways publish. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from quire.cluster.metrics import catalogue as c
from quire.cluster.metrics.gateway_meter import OK, GatewayNumbers
from quire.replicas.config import SchedulerConfig
from quire.replicas.engine.pressure import Pressure
from quire.replicas.errors import Status
from quire.replicas.metric import Sample, samples_of
from quire.replicas.request import ModelInfo
from quire.replicas.stats import EngineStats

ASKING = ("Generate", "Chat")
"""The RPCs that carry requests."""


def gateway_samples(numbers: GatewayNumbers) -> Iterator[Sample]:
    """Return a gateway's samples; unseen statuses are 0, so that a first failure shows as an increase."""
    yield from samples_of(numbers)
    statuses = (OK, *(status.value for status in Status))
    outcomes = {(method, status): 0 for method in ASKING for status in statuses} | dict(numbers.outcomes)
    for (method, status), count in outcomes.items():
        yield Sample(c.REQUESTS, count, {"method": method, "status": status})
    routing = numbers.routing
    for reason, count in routing.decisions.items():
        yield Sample(c.ROUTES, count, {"reason": reason.value})
    yield Sample(c.ROUTE_SCORING, routing.scoring_s)
    yield Sample(c.ROUTE_PREDICTED, routing.predicted)
    yield Sample(c.ROUTE_PREDICTED_SECONDS, routing.predicted_first_token_s)
    yield Sample(c.ROUTE_ACTUAL_SECONDS, routing.actual_first_token_s)
    yield Sample(c.ROUTE_ERROR_SECONDS, routing.error_s)
    yield Sample(c.ROUTE_EXPECTED_CACHED, routing.expected_cached_tokens)
    yield Sample(c.ROUTE_KNOWN_BLOCKS, routing.known_blocks)


def replica_samples(
    stats: EngineStats, info: ModelInfo, limits: SchedulerConfig, pressure: Pressure, *, alive: bool
) -> Iterator[Sample]:
    """Return all that a replica's engine counts, with its limits and the bytes of a token."""
    stored = format_name(info)
    yield from samples_of(stats, format=stored)
    yield from samples_of(pressure)
    yield Sample(c.UP, alive)
    yield Sample(c.RUNNING_LIMIT, limits.max_running)
    yield Sample(c.WAITING_LIMIT, limits.max_queued)
    yield Sample(c.PAGE_TOKENS, info.page_tokens)
    yield Sample(c.TOKEN_BYTES, info.bytes_per_token, {"format": stored})
    yield Sample(c.TOKEN_BYTES_BF16, info.bf16_bytes_per_token)
    for k, v in sorted(set(info.kv_formats)):
        yield Sample(c.KV_LAYERS, info.kv_formats.count((k, v)), {"k": k, "v": v})


def format_name(info: ModelInfo) -> str:
    """Return the format of all layers, such as int8 or int8/int4 (K/V); `mixed` if they differ."""
    formats = set(info.kv_formats)
    if len(formats) > 1:
        return "mixed"
    ((k, v),) = formats
    return k if k == v else f"{k}/{v}"
