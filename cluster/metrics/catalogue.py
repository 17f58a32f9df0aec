"""Every metric there is: its name, type, unit, labels and meaning. Knows no Ray.

`docs/metrics.md` is made of this file. On Ray's endpoints a name begins with `ray_`, and Ray Serve adds the
labels `application`, `deployment` and `replica`: the process that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"  # only ever grows, until its process ends
    GAUGE = "gauge"  # of now
    HISTOGRAM = "histogram"  # one observation for each request


class Origin(StrEnum):
    """Which processes publish it: one series for each, and for each combination of labels."""

    GATEWAY = "gateway"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric. The unit is part of the name, as Prometheus wants it."""

    name: str
    kind: Kind
    origin: Origin
    unit: str
    """Also where the name does not tell: requests, pages, ..."""
    labels: tuple[str, ...] = ()
    """Of few values each."""
    meaning: str
    buckets: tuple[float, ...] = ()
    """Upper bounds, of histograms."""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}"


def _gateway(name: str, kind: Kind, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name=name, kind=kind, origin=Origin.GATEWAY, unit=unit, labels=labels, meaning=meaning)


def _replica(name: str, kind: Kind, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name=name, kind=kind, origin=Origin.REPLICA, unit=unit, labels=labels, meaning=meaning)


def _histogram(name: str, unit: str, buckets: tuple[float, ...], meaning: str) -> Metric:
    return Metric(
        name=name, kind=Kind.HISTOGRAM, origin=Origin.GATEWAY, unit=unit, buckets=buckets, meaning=meaning
    )


_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_GAPS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DURATIONS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = tuple(float(4**power) for power in range(2, 11))

# ---- requests, as their clients see them

REQUESTS = _gateway(
    "quire_requests_total",
    Kind.COUNTER,
    "requests",
    "Calls that ended, by RPC and gRPC status. A request ended through Cancel has status OK",
    "method",
    "status",
)
FIRST_TOKEN = _histogram(
    "quire_request_first_token_seconds",
    "seconds",
    _WAITS_S,
    "From a request's arrival at the gateway to its first token: tokenization, routing, queue, prefill. "
    "Of requests that ended well",
)
INTER_TOKEN = _histogram(
    "quire_request_inter_token_seconds",
    "seconds",
    _GAPS_S,
    "Mean time between two tokens of an output, one observation for each request that ended well",
)
LONGEST_PAUSE = _histogram(
    "quire_request_longest_pause_seconds",
    "seconds",
    _WAITS_S,
    "Longest time between two messages with tokens of a request that ended well: what a reader notices",
)
END_TO_END = _histogram(
    "quire_request_seconds",
    "seconds",
    _DURATIONS_S,
    "From a request's arrival at the gateway to its last token. Of requests that ended well",
)
QUEUE = _histogram(
    "quire_request_queue_seconds",
    "seconds",
    _WAITS_S,
    "From a request's arrival at its replica to its first step, waits for fetched blocks included",
)
PROMPT_SIZE = _histogram(
    "quire_request_prompt_tokens", "tokens", _TOKENS, "Length of the prompts of requests that ended well"
)
OUTPUT_SIZE = _histogram(
    "quire_request_output_tokens",
    "tokens",
    _TOKENS,
    "Tokens of all outputs of requests that ended well",
)

# ---- gateways

GATEWAY_OPEN = _gateway("quire_gateway_open_requests", Kind.GAUGE, "requests", "Requests open on the gateway")
GATEWAY_LIMIT = _gateway(
    "quire_gateway_open_requests_limit",
    Kind.GAUGE,
    "requests",
    "Requests it takes at once (`gateway.max_open_requests`); one more is refused with RESOURCE_EXHAUSTED",
)
GATEWAY_REPLICAS = _gateway(
    "quire_gateway_replicas", Kind.GAUGE, "replicas", "Replicas the gateway has a living stream to"
)
RETRIES = _gateway(
    "quire_gateway_retries_total",
    Kind.COUNTER,
    "requests",
    "Requests sent to a second replica because the first one died",
)

# ---- gateways: which replica a request goes to

ROUTES = _gateway(
    "quire_route_decisions_total",
    Kind.COUNTER,
    "requests",
    "Choices of a replica, by reason: prefix (soonest, and it holds some of the prompt), load (soonest, "
    "and it holds none), copy (idle while another one computes the same prefix: it computes it too), only "
    "(there was no other), blind (nothing is known), fallback (choosing failed, any was taken)",
    "reason",
)
ROUTE_SCORING = _gateway("quire_route_scoring_seconds_total", Kind.COUNTER, "seconds", "Time spent choosing")
ROUTE_PREDICTED = _gateway(
    "quire_route_predicted_requests_total",
    Kind.COUNTER,
    "requests",
    "Requests that were answered and whose time to first token was predicted. The next three are sums over "
    "them",
)
ROUTE_PREDICTED_SECONDS = _gateway(
    "quire_route_predicted_seconds_total", Kind.COUNTER, "seconds", "Predicted times to first token"
)
ROUTE_ACTUAL_SECONDS = _gateway(
    "quire_route_actual_seconds_total",
    Kind.COUNTER,
    "seconds",
    "What they came to, from the choice to the first token",
)
ROUTE_ERROR_SECONDS = _gateway(
    "quire_route_error_seconds_total", Kind.COUNTER, "seconds", "How far predictions were off, up or down"
)
ROUTE_EXPECTED_CACHED = _gateway(
    "quire_route_expected_cached_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Prompt tokens that were thought to be cached at the chosen replica",
)
ROUTE_KNOWN_BLOCKS = _gateway(
    "quire_route_known_blocks",
    Kind.GAUGE,
    "blocks",
    "Blocks that the gateway thinks replicas hold; bounded, so is its memory",
)

# ---- replicas: scheduler and steps

UP = _replica("quire_replica_up", Kind.GAUGE, "replicas", "1 while the replica's engine lives")
RUNNING = _replica("quire_running_sequences", Kind.GAUGE, "sequences", "Sequences that hold pages")
RUNNING_LIMIT = _replica(
    "quire_running_sequences_limit",
    Kind.GAUGE,
    "sequences",
    "Sequences that may hold pages at once (`scheduler.max_running`)",
)
WAITING = _replica(
    "quire_waiting_sequences", Kind.GAUGE, "sequences", "Sequences that wait for pages or a place"
)
WAITING_LIMIT = _replica(
    "quire_waiting_sequences_limit",
    Kind.GAUGE,
    "sequences",
    "Sequences that may wait (`scheduler.max_queued`); one more is refused with RESOURCE_EXHAUSTED",
)
PREEMPTIONS = _replica(
    "quire_preemptions_total",
    Kind.COUNTER,
    "sequences",
    "Sequences that gave their pages back to others and were computed again later",
)
ENGINE_REQUESTS = _replica(
    "quire_engine_requests_total",
    Kind.COUNTER,
    "requests",
    "Requests that left the engine: finished, failed or cancelled",
    "outcome",
)
OCCUPANCY = _replica(
    "quire_pressure_occupancy",
    Kind.GAUGE,
    "share",
    "Of pages that sequences hold or will need, or of places for sequences if these are scarcer. This and "
    "the next three are what autoscaling looks at (`replicas/engine/pressure.py`)",
)
PREFILL_QUEUE = _replica(
    "quire_pressure_prefill_queue_seconds",
    Kind.GAUGE,
    "seconds",
    "Time to compute the prompt tokens that are still to be computed",
)
PREFILL_USE = _replica(
    "quire_pressure_prefill_use",
    Kind.GAUGE,
    "share",
    "Prompt tokens computed lately, of those that could have been",
)
RECENT_FIRST_TOKEN = _replica(
    "quire_pressure_first_token_seconds",
    Kind.GAUGE,
    "seconds",
    "Time to first token at the replica: 90th percentile of the last seconds, or the age of who waits "
    "longest",
)
STEPS = _replica("quire_steps_total", Kind.COUNTER, "steps", "Forward passes")
STEP_SECONDS = _replica(
    "quire_step_seconds_total",
    Kind.COUNTER,
    "seconds",
    "Time spent in steps, by part: plan (schedule, prefixes), forward (lay out, run; on one GPU only launch "
    "it), sample (draw; on one GPU also the wait for the step before), emit (publish blocks, text, events)",
    "part",
)

# ---- replicas: tokens and cache

PROMPT_TOKENS = _replica(
    "quire_prompt_tokens_total",
    Kind.COUNTER,
    "tokens",
    "Prompt tokens by where their KV came from: computed (again, after a preemption), local (in the pool "
    "already), host (back from host memory) or remote (sent by another replica). "
    "Hit rate: all but computed, of all",
    "source",
)
OUTPUT_TOKENS = _replica("quire_output_tokens_total", Kind.COUNTER, "tokens", "Tokens of outputs")
PAGES = _replica(
    "quire_pages",
    Kind.GAUGE,
    "pages",
    "Pages of the pool of each shard, by state (used: sequences or peers hold them; cached: blocks nobody "
    "uses; free) and by the format of what they hold",
    "state",
    "format",
)
PAGE_TOKENS = _replica("quire_page_tokens", Kind.GAUGE, "tokens", "Tokens of a page (`pool.page_tokens`)")
TOKEN_BYTES = _replica(
    "quire_kv_token_bytes",
    Kind.GAUGE,
    "bytes",
    "KV bytes of a token over all shards and layers, scales and padding counted",
    "format",
)
TOKEN_BYTES_BF16 = _replica(
    "quire_kv_token_bf16_bytes", Kind.GAUGE, "bytes", "The same, were it stored in bf16"
)
KV_LAYERS = _replica(
    "quire_kv_layers", Kind.GAUGE, "layers", "Layers whose K and V are stored in these formats", "k", "v"
)
HOST_BLOCKS = _replica(
    "quire_host_blocks",
    Kind.GAUGE,
    "blocks",
    "Room in host memory, by state: used (a block lies there) or free. Both 0 without `pool.host_bytes`",
    "state",
)
HOST_COPIES = _replica(
    "quire_host_copies_total",
    Kind.COUNTER,
    "blocks",
    "Blocks that left the pool: demoted (to host memory), promoted (back from there) or dropped (gone)",
    "way",
)
NONFINITE = _replica(
    "quire_nonfinite_outputs_total",
    Kind.COUNTER,
    "outputs",
    "Outputs given up because the model's logits were not finite: damaged weights or memory. One is too many",
)

# ---- replicas: blocks from each other

FETCHES = _replica("quire_fetches_total", Kind.COUNTER, "fetches", "Fetches asked of other replicas")
FETCH_SECONDS = _replica(
    "quire_fetch_seconds_total", Kind.COUNTER, "seconds", "From question to end, summed over fetches"
)
FETCH_CHOICES = _replica(
    "quire_fetch_choices_total",
    Kind.COUNTER,
    "prompts",
    "Prompts whose blocks another replica held, by what was predicted to be sooner: fetch or recompute",
    "choice",
)
FETCH_FAILURES = _replica(
    "quire_fetch_failures_total",
    Kind.COUNTER,
    "fetches",
    "Fetches that ended in computing, by cause (`kvstore/wire/failures.py`)",
    "cause",
)
FETCHED_BLOCKS = _replica(
    "quire_fetched_blocks_total", Kind.COUNTER, "blocks", "Blocks that came from other replicas"
)
LOANS = _replica("quire_loans_total", Kind.COUNTER, "loans", "Loans of blocks granted to other replicas")
LOAN_FAILURES = _replica(
    "quire_loan_failures_total",
    Kind.COUNTER,
    "loans",
    "Loans that ended badly, by cause; each shard's part counts",
    "cause",
)
TRANSFERRED_BYTES = _replica(
    "quire_transferred_bytes_total",
    Kind.COUNTER,
    "bytes",
    "Page bytes sent to or received from other replicas",
    "direction",
)
SAVED_BYTES = _replica(
    "quire_transfer_saved_bytes_total",
    Kind.COUNTER,
    "bytes",
    "What the received blocks would have been in bf16, less what they are",
)

CATALOGUE: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)
"""All of them, in the order of this file."""
