"""Every metric there is: those of gateways, defined here, and those of replicas (`replicas/stats.py`).

`docs/metrics.md` is made of this. On Ray's endpoints a name begins with `ray_`, and Ray Serve adds the labels
`application`, `deployment` and `replica`: the process that publishes it.
"""

from __future__ import annotations

from quire.replicas.metric import Kind, Metric, Origin
from quire.replicas.stats import *  # noqa: F403  one namespace for dashboards and alerts


def _counter(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, Origin.GATEWAY, unit, meaning, labels)


def _gauge(name: str, unit: str, meaning: str) -> Metric:
    return Metric(name, Kind.GAUGE, Origin.GATEWAY, unit, meaning)


def _histogram(name: str, unit: str, buckets: tuple[float, ...], meaning: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, Origin.GATEWAY, unit, meaning, buckets=buckets)


_WAITS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
_GAPS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DURATIONS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = tuple(float(4**power) for power in range(2, 11))

# ---- requests, as their clients see them

REQUESTS = _counter(
    "quire_requests_total",
    "requests",
    "Calls that ended, by RPC and gRPC status. A request ended through Cancel has status OK",
    "method",
    "status",
)
FIRST_TOKEN = _histogram(
    "quire_request_first_token_seconds",
    "seconds",
    _WAITS_S,
    "TTFT: from a request's arrival at the gateway to its first token, through tokenization, routing, queue "
    "and prefill. Of requests that ended well",
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
    "quire_request_output_tokens", "tokens", _TOKENS, "Tokens of all outputs of requests that ended well"
)

# ---- gateways

GATEWAY_OPEN = _gauge("quire_gateway_open_requests", "requests", "Requests open on the gateway")
GATEWAY_LIMIT = _gauge(
    "quire_gateway_open_requests_limit",
    "requests",
    "Requests it takes at once (`gateway.max_open_requests`); one more is refused with RESOURCE_EXHAUSTED",
)
GATEWAY_REPLICAS = _gauge(
    "quire_gateway_replicas", "replicas", "Replicas that the gateway has a live stream to"
)
RETRIES = _counter(
    "quire_gateway_retries_total",
    "requests",
    "Requests sent to a second replica because the first one died",
)

# ---- gateways: which replica a request goes to

ROUTES = _counter(
    "quire_route_decisions_total",
    "requests",
    "Choices of a replica, by reason: prefix (fastest, and it holds some of the prompt), load (fastest, "
    "and it holds none), copy (idle while another one computes the same prefix: it computes it too), only "
    "(there was no other), blind (nothing is known), fallback (choosing failed, any was taken)",
    "reason",
)
ROUTE_SCORING = _counter("quire_route_scoring_seconds_total", "seconds", "Time spent choosing")
ROUTE_PREDICTED = _counter(
    "quire_route_predicted_requests_total",
    "requests",
    "Requests that were answered and whose TTFT was predicted. The next three are sums over them",
)
ROUTE_PREDICTED_SECONDS = _counter("quire_route_predicted_seconds_total", "seconds", "Predicted TTFT")
ROUTE_ACTUAL_SECONDS = _counter(
    "quire_route_actual_seconds_total", "seconds", "Actual TTFT, from the choice to the first token"
)
ROUTE_ERROR_SECONDS = _counter(
    "quire_route_error_seconds_total", "seconds", "How far predictions were off, up or down"
)
ROUTE_EXPECTED_CACHED = _counter(
    "quire_route_expected_cached_tokens_total",
    "tokens",
    "Prompt tokens that were expected to be cached at the chosen replica",
)
ROUTE_KNOWN_BLOCKS = _gauge(
    "quire_route_known_blocks",
    "blocks",
    "Blocks that the gateway expects replicas to hold; bounded, so is its memory",
)

CATALOGUE: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)
"""All of them, in the order in which they are defined."""
