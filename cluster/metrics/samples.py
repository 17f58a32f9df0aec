"""From counted numbers to values of metrics: what a replica and a gateway say. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from quire.cluster.metrics import catalogue as c
from quire.cluster.metrics.gateway_meter import OK, Answered, GatewayNumbers
from quire.kvstore.peers.cost import Choice
from quire.kvstore.wire.failures import Cause
from quire.replicas.config import SchedulerConfig
from quire.replicas.engine.pressure import Pressure
from quire.replicas.engine.step_clock import Part
from quire.replicas.errors import Status
from quire.replicas.request import EngineStats, ModelInfo

ASKING = ("Generate", "Chat")
"""The RPCs that carry requests."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a metric is now; of a counter, the whole since the process' start."""

    metric: c.Metric
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


def gateway_samples(numbers: GatewayNumbers) -> Iterator[Sample]:
    """Statuses that have not been seen yet count 0: a first failure must be seen as a step from there."""
    yield Sample(c.GATEWAY_OPEN, numbers.open_requests)
    yield Sample(c.GATEWAY_LIMIT, numbers.max_open_requests)
    yield Sample(c.GATEWAY_REPLICAS, numbers.replicas)
    yield Sample(c.RETRIES, numbers.retries)
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


def observations(answered: Answered) -> Iterator[tuple[c.Metric, float]]:
    """What one request adds to the histograms."""
    values = {
        c.FIRST_TOKEN: answered.first_token_s,
        c.INTER_TOKEN: answered.inter_token_s,
        c.LONGEST_PAUSE: answered.longest_pause_s,
        c.END_TO_END: answered.total_s,
        c.QUEUE: answered.queue_s,
        c.PROMPT_SIZE: answered.prompt_tokens,
        c.OUTPUT_SIZE: answered.output_tokens,
    }
    return ((metric, value) for metric, value in values.items() if value is not None)


def replica_samples(
    stats: EngineStats, info: ModelInfo, limits: SchedulerConfig, pressure: Pressure, *, alive: bool
) -> Iterator[Sample]:
    """All that a replica's engine counts. Causes that have not been seen yet count 0."""
    yield Sample(c.UP, alive)
    yield Sample(c.RUNNING, stats.running)
    yield Sample(c.RUNNING_LIMIT, limits.max_running)
    yield Sample(c.WAITING, stats.queued)
    yield Sample(c.WAITING_LIMIT, limits.max_queued)
    yield Sample(c.PREEMPTIONS, stats.preemptions)
    for outcome in ("finished", "failed", "cancelled"):
        yield Sample(c.ENGINE_REQUESTS, getattr(stats, f"requests_{outcome}"), {"outcome": outcome})
    yield Sample(c.STEPS, stats.steps)
    for part in Part:
        yield Sample(c.STEP_SECONDS, stats.step_part_seconds.get(part, 0.0), {"part": part.value})
    yield Sample(c.OCCUPANCY, pressure.occupancy)
    yield Sample(c.PREFILL_QUEUE, pressure.prefill_queue_s)
    yield Sample(c.PREFILL_USE, pressure.prefill_use)
    yield Sample(c.RECENT_FIRST_TOKEN, pressure.first_token_s)
    yield from _tokens(stats)
    yield from _memory(stats, info)
    yield from _transfers(stats)


def format_name(info: ModelInfo) -> str:
    """The one format of all layers, such as int8 or int8/int4 (K/V); else `mixed`."""
    formats = set(info.kv_formats)
    if len(formats) > 1:
        return "mixed"
    ((k, v),) = formats
    return k if k == v else f"{k}/{v}"


def _tokens(stats: EngineStats) -> Iterator[Sample]:
    local = stats.cached_tokens - stats.remote_tokens - stats.host_tokens
    sources = {
        "computed": stats.prompt_tokens,
        "local": local,
        "host": stats.host_tokens,
        "remote": stats.remote_tokens,
    }
    for source, tokens in sources.items():
        yield Sample(c.PROMPT_TOKENS, tokens, {"source": source})
    yield Sample(c.OUTPUT_TOKENS, stats.output_tokens)
    yield Sample(c.NONFINITE, stats.nonfinite_outputs)


def _memory(stats: EngineStats, info: ModelInfo) -> Iterator[Sample]:
    stored = format_name(info)
    for state in ("used", "cached", "free"):
        yield Sample(c.PAGES, getattr(stats, f"pages_{state}"), {"state": state, "format": stored})
    yield Sample(c.PAGE_TOKENS, info.page_tokens)
    yield Sample(c.TOKEN_BYTES, info.bytes_per_token, {"format": stored})
    yield Sample(c.TOKEN_BYTES_BF16, info.bf16_bytes_per_token)
    for k, v in sorted(set(info.kv_formats)):
        yield Sample(c.KV_LAYERS, info.kv_formats.count((k, v)), {"k": k, "v": v})
    yield Sample(c.HOST_BLOCKS, stats.host_blocks, {"state": "used"})
    yield Sample(c.HOST_BLOCKS, stats.host_slots - stats.host_blocks, {"state": "free"})
    for way in ("demoted", "promoted", "dropped"):
        yield Sample(c.HOST_COPIES, getattr(stats, f"{way}_blocks"), {"way": way})


def _transfers(stats: EngineStats) -> Iterator[Sample]:
    yield Sample(c.FETCHES, stats.fetches)
    yield Sample(c.FETCH_SECONDS, stats.fetch_seconds)
    for choice in Choice:
        yield Sample(c.FETCH_CHOICES, stats.fetch_choices.get(choice, 0), {"choice": choice.value})
    for cause in Cause:
        yield Sample(c.FETCH_FAILURES, stats.fetch_failures.get(cause, 0), {"cause": cause.value})
        yield Sample(c.LOAN_FAILURES, stats.loan_failures.get(cause, 0), {"cause": cause.value})
    yield Sample(c.FETCHED_BLOCKS, stats.fetched_blocks)
    yield Sample(c.LOANS, stats.loans)
    yield Sample(c.TRANSFERRED_BYTES, stats.bytes_received, {"direction": "received"})
    yield Sample(c.TRANSFERRED_BYTES, stats.bytes_sent, {"direction": "sent"})
    yield Sample(c.SAVED_BYTES, stats.bytes_saved)
