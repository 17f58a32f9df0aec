"""The dashboard for planning: demand, supply, and what the formats save."""

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

_POOL_TOKENS = f"sum({HERE.sum(c.PAGES, 'replica')} * on (replica) {HERE.sum(c.PAGE_TOKENS, 'replica')})"
_SMALLER = f"avg({HERE.series(c.TOKEN_BYTES_BF16)}) / avg({HERE.series(c.TOKEN_BYTES)})"


_DEMAND = Row(
    "Demand",
    "Requests, tokens and the sizes of both. Watch them over days, not minutes.",
    (
        Panel(
            "Requests",
            "A second, without those that were refused.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.REQUESTS, method=ASKING, status="OK"), "answered"),),
        ),
        Panel(
            "Refused",
            "RESOURCE_EXHAUSTED: demand beyond capacity.",
            Unit.PER_SECOND,
            (Query(HERE.rate(c.REQUESTS, method=ASKING, status="RESOURCE_EXHAUSTED"), "refused"),),
        ),
        Panel(
            "Tokens",
            "A second: prompts computed, prompts found, outputs.",
            Unit.PER_SECOND,
            (
                Query(HERE.rate(c.PROMPT_TOKENS, source="computed"), "prompts, computed"),
                Query(HERE.rate(c.PROMPT_TOKENS, source=("local", "host", "remote")), "prompts, found"),
                Query(HERE.rate(c.OUTPUT_TOKENS), "outputs"),
            ),
            stacked=True,
        ),
        Panel("Prompt size", "Tokens.", Unit.COUNT, quantiles(c.PROMPT_SIZE, 0.5, 0.9, 0.99)),
        Panel("Output size", "Tokens.", Unit.COUNT, quantiles(c.OUTPUT_SIZE, 0.5, 0.9, 0.99)),
    ),
)
_SUPPLY = Row(
    "Supply",
    "How much of the capacity is used. Replicas against Ray Serve's target; an engine that is busy all the "
    "time has no steps to spare; a pool that is full preempts.",
    (
        Panel(
            "Replicas",
            "Alive, and Ray Serve's target (of autoscaling, or the configured count).",
            Unit.COUNT,
            (Query(HERE.sum(c.UP), "alive"), Query(f"sum({WANTED})", "wanted")),
        ),
        Panel(
            "Pressure",
            "The inputs of autoscaling, mean of all replicas: occupancy and prefill use (shares), prefill "
            "backlog (seconds).",
            Unit.COUNT,
            (
                Query(f"avg({HERE.series(c.OCCUPANCY)})", "occupancy"),
                Query(f"avg({HERE.series(c.PREFILL_USE)})", "prefill in use"),
                Query(f"avg({HERE.series(c.PREFILL_QUEUE)})", "prefill queue, s"),
            ),
        ),
        Panel(
            "Recent first token",
            "At each replica: what autoscaling compares with its target.",
            Unit.SECONDS,
            (Query(HERE.sum(c.RECENT_FIRST_TOKEN, "replica"), "{{replica}}"),),
        ),
        Panel(
            "Engines busy",
            "Share of time in steps, mean of all replicas.",
            Unit.SHARE,
            (Query(f"{HERE.rate(c.STEP_SECONDS)} / {HERE.sum(c.UP)}", "busy"),),
        ),
        Panel(
            "Places in use",
            "Running sequences of those that may run; waiting of those that may wait.",
            Unit.SHARE,
            (
                Query(f"{HERE.sum(c.RUNNING)} / {HERE.sum(c.RUNNING_LIMIT)}", "running"),
                Query(f"{HERE.sum(c.WAITING)} / {HERE.sum(c.WAITING_LIMIT)}", "waiting"),
            ),
        ),
        Panel(
            "Pool in use",
            "Pages that sequences hold; with cached blocks, which may be evicted at any time.",
            Unit.SHARE,
            (
                Query(POOL_SHARE, "used"),
                Query(
                    f"{HERE.sum(c.PAGES, state=('used', 'cached'))} / {HERE.sum(c.PAGES)}", "used and cached"
                ),
            ),
        ),
        Panel(
            "Output of a replica",
            "Tokens a second for each replica that is alive.",
            Unit.PER_SECOND,
            (Query(f"{HERE.rate(c.OUTPUT_TOKENS)} / {HERE.sum(c.UP)}", "tokens"),),
        ),
        Panel(
            "Machines",
            "Cores and memory in use on all nodes.",
            Unit.SHARE,
            (
                Query(
                    "sum(ray_node_cpu_utilization * ray_node_cpu_count) / sum(ray_node_cpu_count) / 100",
                    "cores",
                ),
                Query("sum(ray_node_mem_used) / sum(ray_node_mem_total)", "memory"),
            ),
        ),
    ),
)
_MEMORY = Row(
    "What the formats save",
    "Tokens that fit, against bf16 in the same memory; prefill and traffic that the cache and the formats "
    "save, beside the latency, to see whether a smaller format or fleet still meets its target.",
    (
        one("Tokens that fit", "In the pools of all replicas.", Unit.COUNT, _POOL_TOKENS),
        one(
            "Tokens in bf16",
            "That would fit in the same memory.",
            Unit.COUNT,
            f"{_POOL_TOKENS} / ({_SMALLER})",
        ),
        one(
            "Bytes of a token",
            "KV over all layers and shards, scales and padding included.",
            Unit.BYTES,
            f"avg({HERE.series(c.TOKEN_BYTES)})",
        ),
        one("Smaller than bf16", "Times.", Unit.COUNT, _SMALLER),
        Panel(
            "Prefill saved",
            "Prompt tokens found rather than computed.",
            Unit.SHARE,
            (Query(hits("local", "host", "remote"), "saved"),),
        ),
        Panel(
            "Traffic saved",
            "Additional bytes a second that bf16 would have moved.",
            Unit.BYTES_S,
            (Query(HERE.rate(c.SAVED_BYTES), "saved"),),
        ),
        Panel("First token", "From arrival.", Unit.SECONDS, quantiles(c.FIRST_TOKEN, 0.5, 0.9)),
        Panel("Between tokens", "Mean gap.", Unit.SECONDS, quantiles(c.INTER_TOKEN, 0.5, 0.9)),
    ),
)

CAPACITY = Dashboard(
    "quire-capacity",
    "Quire: capacity",
    "Demand, supply, and what the formats save.",
    (_DEMAND, _SUPPLY, _MEMORY),
)
