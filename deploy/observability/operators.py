"""The operators' dashboard: whether the service is healthy, and if not, where to look."""

from __future__ import annotations

from observability.panels import (
    HERE,
    POOL_SHARE,
    WANTED,
    Dashboard,
    Panel,
    Query,
    Row,
    Unit,
    hits,
    one,
    quantiles,
)

from quire.cluster.metrics import catalogue as c
from quire.cluster.metrics.samples import ASKING

_BAD = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
_NOW = Row(
    "Now",
    "Is it healthy? Replicas against Ray Serve's target, open and failed requests, TTFT, the hit rate of the "
    "cache, and how full the pool is.",
    (
        one("Replicas", "Engines that are alive.", Unit.COUNT, HERE.sum(c.UP)),
        one("Replicas wanted", "Ray Serve's target.", Unit.COUNT, f"sum({WANTED})"),
        one("Open requests", "On all gateways.", Unit.COUNT, HERE.sum(c.GATEWAY_OPEN)),
        one(
            "Bad answers",
            "Share of requests that ended with INTERNAL, UNAVAILABLE, DEADLINE_EXCEEDED or "
            "RESOURCE_EXHAUSTED.",
            Unit.SHARE,
            HERE.share(c.REQUESTS, {"method": ASKING}, status=_BAD),
        ),
        one("First token, p90", "As clients see it.", Unit.SECONDS, HERE.quantile(0.9, c.FIRST_TOKEN)),
        one(
            "Hit rate",
            "Prompt tokens whose KV was found rather than computed.",
            Unit.SHARE,
            hits("local", "host", "remote"),
        ),
        one("Pool in use", "Pages that sequences or peers hold, of all.", Unit.SHARE, POOL_SHARE),
        one("Output", "Tokens a second, all replicas.", Unit.PER_SECOND, HERE.rate(c.OUTPUT_TOKENS)),
    ),
)
_REQUESTS = Row(
    "Requests",
    "Requests and how they end. RESOURCE_EXHAUSTED: gateways or queues are full. UNAVAILABLE: a replica died "
    "under a request that could not be resumed, or none was ready. Retries: a replica died, and another one "
    "took over.",
    (
        Panel(
            "Requests by status",
            "Calls that ended, by gRPC status.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.REQUESTS, "status", method=ASKING), "{{status}}"),),
            stacked=True,
        ),
        Panel(
            "Open requests",
            "On each gateway, and its limit.",
            Unit.COUNT,
            (
                Query(HERE.sum(c.GATEWAY_OPEN, "replica"), "open on {{replica}}"),
                Query(HERE.sum(c.GATEWAY_LIMIT, "replica"), "limit of {{replica}}"),
            ),
        ),
        Panel(
            "Retries",
            "Requests that a second replica took over because the first one died.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.RETRIES), "retries"),),
        ),
        Panel(
            "Replicas",
            "Engines that are alive, Ray Serve's target, and the streams of each gateway.",
            Unit.COUNT,
            (
                Query(HERE.sum(c.UP), "alive"),
                Query(f"sum({WANTED})", "wanted"),
                Query(HERE.sum(c.GATEWAY_REPLICAS, "replica"), "linked to {{replica}}"),
            ),
        ),
    ),
)
_LATENCY = Row(
    "Latency",
    "Latency as clients see it. A slow first token with a long queue needs replicas or fewer requests; with "
    "a short one, prompts are long or the cache is cold. Long pauses with good means: prefill or preemption "
    "delays decoding.",
    (
        Panel(
            "First token",
            "From arrival at the gateway.",
            Unit.SECONDS,
            quantiles(c.FIRST_TOKEN, 0.5, 0.9, 0.99),
        ),
        Panel(
            "Between tokens",
            "Mean gap within a request, over requests.",
            Unit.SECONDS,
            quantiles(c.INTER_TOKEN, 0.5, 0.9, 0.99),
        ),
        Panel(
            "Longest pause",
            "Longest wait for the next message within a request.",
            Unit.SECONDS,
            quantiles(c.LONGEST_PAUSE, 0.5, 0.9, 0.99),
        ),
        Panel(
            "End to end",
            "From arrival to the last token.",
            Unit.SECONDS,
            quantiles(c.END_TO_END, 0.5, 0.9, 0.99),
        ),
        Panel(
            "Queue",
            "At the replica, before the first step.",
            Unit.SECONDS,
            quantiles(c.QUEUE, 0.5, 0.9, 0.99),
        ),
    ),
)
_SCHEDULER = Row(
    "Scheduler and steps",
    "What replicas do. Preemptions mean that the pool is too small for what runs. Parts of the step add up "
    "to the share of time an engine is busy; more than a little outside `forward` and `sample` is time of "
    "the host.",
    (
        Panel(
            "Running",
            "Sequences that hold pages, and how many may.",
            Unit.COUNT,
            (
                Query(HERE.sum(c.RUNNING, "replica"), "{{replica}}"),
                Query(f"max({HERE.series(c.RUNNING_LIMIT)})", "limit of each"),
            ),
        ),
        Panel(
            "Waiting",
            "Sequences that wait, and how many may.",
            Unit.COUNT,
            (
                Query(HERE.sum(c.WAITING, "replica"), "{{replica}}"),
                Query(f"max({HERE.series(c.WAITING_LIMIT)})", "limit of each"),
            ),
        ),
        Panel(
            "Preemptions",
            "Sequences that lost their pages and are recomputed.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.PREEMPTIONS, "replica"), "{{replica}}"),),
        ),
        Panel(
            "Parts of the step",
            "Seconds a second, all replicas.",
            Unit.COUNT,
            (Query(HERE.rate(c.STEP_SECONDS, "part"), "{{part}}"),),
            stacked=True,
        ),
        Panel(
            "Steps",
            "Forward passes a second.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.STEPS, "replica"), "{{replica}}"),),
        ),
        Panel(
            "Requests that left engines",
            "Finished, failed or cancelled there.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.ENGINE_REQUESTS, "outcome"), "{{outcome}}"),),
        ),
    ),
)
_CACHE = Row(
    "Cache",
    "Where the KV of prompts comes from: computed, or found in the pool, in host memory or at another "
    "replica. A hit rate that falls at the same load means that requests no longer go where their prefix "
    "is, or that it was evicted.",
    (
        Panel(
            "Prompt tokens by source",
            "A second, all replicas.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.PROMPT_TOKENS, "source"), "{{source}}"),),
            stacked=True,
        ),
        Panel(
            "Hit rate by source",
            "Share of all prompt tokens.",
            Unit.SHARE,
            tuple(Query(hits(source), source) for source in ("local", "host", "remote")),
            stacked=True,
        ),
        Panel(
            "Pages by state",
            "Of the pools of one shard of each replica.",
            Unit.COUNT,
            (Query(HERE.sum(c.PAGES, "state, format"), "{{state}} ({{format}})"),),
            stacked=True,
        ),
        Panel(
            "Host memory",
            "Blocks that are there, and room for more.",
            Unit.COUNT,
            (Query(HERE.sum(c.HOST_BLOCKS, "state"), "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Blocks that left the pool",
            "To host memory, back, or gone.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.HOST_COPIES, "way"), "{{way}}"),),
        ),
    ),
)
_ROUTING = Row(
    "Routing",
    "Where gateways send requests, and how well they predict. `blind` and `fallback` are for the first "
    "seconds of a replica; many of them, or predictions that are far off, mean that reports are missing.",
    (
        Panel(
            "Choices by reason",
            "Requests a second.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.ROUTES, "reason"), "{{reason}}"),),
            stacked=True,
        ),
        Panel(
            "First token, predicted and actual",
            "Means of requests with a prediction, from the choice on; and how far off it was.",
            Unit.SECONDS,
            (
                Query(HERE.mean(c.ROUTE_PREDICTED_SECONDS, c.ROUTE_PREDICTED), "predicted"),
                Query(HERE.mean(c.ROUTE_ACTUAL_SECONDS, c.ROUTE_PREDICTED), "actual"),
                Query(HERE.mean(c.ROUTE_ERROR_SECONDS, c.ROUTE_PREDICTED), "off by"),
            ),
        ),
        Panel(
            "Cached tokens, expected and found",
            "Prompt tokens a second: expected in the pool or host memory of the chosen replica, and found "
            "there.",
            Unit.PER_SECOND,
            (
                Query(HERE.rate(c.ROUTE_EXPECTED_CACHED), "expected"),
                Query(HERE.rate(c.PROMPT_TOKENS, source=("local", "host")), "found"),
            ),
        ),
        Panel(
            "A choice takes",
            "On average.",
            Unit.SECONDS,
            (Query(HERE.mean(c.ROUTE_SCORING, c.ROUTES), "scoring"),),
        ),
        Panel(
            "Known blocks",
            "Blocks that each gateway expects replicas to hold.",
            Unit.COUNT,
            (Query(HERE.sum(c.ROUTE_KNOWN_BLOCKS, "replica"), "{{replica}}"),),
        ),
    ),
)
_TRANSFERS = Row(
    "Transfers between replicas",
    "Blocks that replicas fetch from each other. Failures cost no request: the blocks are recomputed. "
    "`refused` and `busy` are normal in small numbers; `deadline` and `peer` mean slow links or dying "
    "replicas; `checksum` means that bytes changed in transit or in the owner.",
    (
        Panel(
            "Bytes",
            "Page bytes a second between replicas, and the additional bytes of bf16.",
            Unit.BYTES_S,
            (
                Query(HERE.rate(c.TRANSFERRED_BYTES, "direction"), "{{direction}}"),
                Query(HERE.rate(c.SAVED_BYTES), "saved against bf16"),
            ),
        ),
        Panel(
            "Fetches, loans and blocks",
            "Requested, granted, received.",
            Unit.PER_SECOND,
            (
                Query(HERE.rate(c.FETCHES), "fetches"),
                Query(HERE.rate(c.LOANS), "loans"),
                Query(HERE.rate(c.FETCHED_BLOCKS), "blocks"),
            ),
        ),
        Panel(
            "Failures by cause",
            "Fetches that ended in recomputing.",
            Unit.PER_SECOND,
            (
                Query(HERE.rate(c.FETCH_FAILURES, "cause"), "fetch: {{cause}}"),
                Query(HERE.rate(c.LOAN_FAILURES, "cause"), "loan: {{cause}}"),
            ),
        ),
        Panel(
            "A fetch takes",
            "From request to end, on average.",
            Unit.SECONDS,
            (Query(HERE.mean(c.FETCH_SECONDS, c.FETCHES), "mean"),),
        ),
        Panel(
            "Fetch or recompute",
            "Which was predicted to be faster where another replica held the blocks.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.FETCH_CHOICES, "choice"), "{{choice}}"),),
        ),
    ),
)
_QUALITY = Row(
    "Quality",
    "What could make answers worse: the formats in use, logits that are not finite, bytes that changed in "
    "transit (blocks are dropped and recomputed). Any event here needs investigation.",
    (
        Panel(
            "Layers by format",
            "K and V codes.",
            Unit.COUNT,
            (Query(f"max by (k, v) ({HERE.series(c.KV_LAYERS)})", "K {{k}} V {{v}}"),),
        ),
        Panel(
            "Damage",
            "Outputs with logits that are not finite; fetches whose checksum did not match.",
            Unit.COUNT,
            (
                Query(HERE.increase(c.NONFINITE), "not finite"),
                Query(HERE.increase(c.FETCH_FAILURES, cause="checksum"), "checksum"),
            ),
        ),
    ),
)
OPERATORS = Dashboard(
    "quire-operators",
    "Quire: operation",
    "Whether the service is healthy, and if not, where to look.",
    (_NOW, _REQUESTS, _LATENCY, _SCHEDULER, _CACHE, _ROUTING, _TRANSFERS, _QUALITY),
)
