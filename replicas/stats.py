"""Everything a replica's engine counts, in one table.

`EngineStats` has a field for each counter and gauge, which names its metric. The rest follows from the table:
the wire takes fields by name (`ReplicaStats` in inference.proto; a test holds the two together), the metrics
and docs/metrics.md come from the fields' metrics. To add a counter, write its metric and its field here, its
field in the proto, and count it where it happens (`engine/meter.py`, `engine/blocks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quire.kvstore.peers.cost import Choice
from quire.kvstore.wire.failures import Cause
from quire.replicas.engine.step_clock import Part
from quire.replicas.metric import Kind, Metric, Origin, series


def _counter(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, Origin.REPLICA, unit, meaning, labels)


def _gauge(name: str, unit: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, Origin.REPLICA, unit, meaning, labels)


# ---- scheduler and steps

UP = _gauge("quire_replica_up", "replicas", "1 while the replica's engine lives")
RUNNING = _gauge("quire_running_sequences", "sequences", "Sequences that hold pages")
RUNNING_LIMIT = _gauge(
    "quire_running_sequences_limit",
    "sequences",
    "Sequences that may hold pages at once (`scheduler.max_running`)",
)
WAITING = _gauge("quire_waiting_sequences", "sequences", "Sequences that wait for pages or a slot")
WAITING_LIMIT = _gauge(
    "quire_waiting_sequences_limit",
    "sequences",
    "Sequences that may wait (`scheduler.max_queued`); one more is refused with RESOURCE_EXHAUSTED",
)
PREEMPTIONS = _counter(
    "quire_preemptions_total",
    "sequences",
    "Sequences that gave their pages back to others and were recomputed later",
)
ENGINE_REQUESTS = _counter(
    "quire_engine_requests_total",
    "requests",
    "Requests that left the engine: finished, failed or cancelled",
    "outcome",
)
OCCUPANCY = _gauge(
    "quire_pressure_occupancy",
    "share",
    "Share of the pages that sequences hold or will need, or of the slots for sequences if these are "
    "scarcer. This and the next three are what autoscaling looks at (`replicas/engine/pressure.py`)",
)
PREFILL_QUEUE = _gauge(
    "quire_pressure_prefill_queue_seconds",
    "seconds",
    "Time to compute the prompt tokens that are still to be computed",
)
PREFILL_USE = _gauge(
    "quire_pressure_prefill_use",
    "share",
    "Prompt tokens computed in the last seconds, as a share of what could have been computed",
)
RECENT_FIRST_TOKEN = _gauge(
    "quire_pressure_first_token_seconds",
    "seconds",
    "TTFT at the replica: the 90th percentile of the last seconds, or the age of the request that waits "
    "longest",
)
STEPS = _counter("quire_steps_total", "steps", "Forward passes")
STEP_SECONDS = _counter(
    "quire_step_seconds_total",
    "seconds",
    "Time spent in steps, by part: plan (schedule, prefixes), forward (lay out, run; on one GPU only launch "
    "it), sample (draw; on one GPU also the wait for the step before), emit (publish blocks, text, events)",
    "part",
)

# ---- tokens and cache

PROMPT_TOKENS = _counter(
    "quire_prompt_tokens_total",
    "tokens",
    "Prompt tokens by where their KV came from: computed (again, after a preemption), local (in the pool "
    "already), host (back from host memory) or remote (sent by another replica). "
    "Hit rate: all but computed, of all",
    "source",
)
OUTPUT_TOKENS = _counter("quire_output_tokens_total", "tokens", "Tokens of outputs")
PAGES = _gauge(
    "quire_pages",
    "pages",
    "Pages of the pool of each shard, by state (used: sequences or peers hold them; cached: blocks that are "
    "not in use; free) and by the format of what they hold",
    "state",
    "format",
)
PAGE_TOKENS = _gauge("quire_page_tokens", "tokens", "Tokens of a page (`pool.page_tokens`)")
TOKEN_BYTES = _gauge(
    "quire_kv_token_bytes",
    "bytes",
    "KV bytes of a token over all shards and layers, including scales and padding",
    "format",
)
TOKEN_BYTES_BF16 = _gauge("quire_kv_token_bf16_bytes", "bytes", "The same, were it stored in bf16")
KV_LAYERS = _gauge("quire_kv_layers", "layers", "Layers whose K and V are stored in these formats", "k", "v")
HOST_BLOCKS = _gauge(
    "quire_host_blocks",
    "blocks",
    "Blocks that host memory has room for, by state: used or free. Both 0 without `pool.host_bytes`",
    "state",
)
HOST_COPIES = _counter(
    "quire_host_copies_total",
    "blocks",
    "Blocks that left the pool: demoted (to host memory), promoted (back from there) or dropped (gone)",
    "way",
)
NONFINITE = _counter(
    "quire_nonfinite_outputs_total",
    "outputs",
    "Outputs given up because the model's logits were not finite: damaged weights or memory. One is too many",
)

# ---- blocks from other replicas

FETCHES = _counter("quire_fetches_total", "fetches", "Fetches requested from other replicas")
FETCH_SECONDS = _counter(
    "quire_fetch_seconds_total", "seconds", "Time from request to end, summed over fetches"
)
FETCH_CHOICES = _counter(
    "quire_fetch_choices_total",
    "prompts",
    "Prompts whose blocks another replica held, by what was predicted to be faster: fetch or recompute",
    "choice",
)
FETCH_FAILURES = _counter(
    "quire_fetch_failures_total",
    "fetches",
    "Fetches that failed, so that the blocks were computed, by cause (`kvstore/wire/failures.py`)",
    "cause",
)
FETCHED_BLOCKS = _counter("quire_fetched_blocks_total", "blocks", "Blocks that came from other replicas")
LOANS = _counter("quire_loans_total", "loans", "Loans of blocks granted to other replicas")
LOAN_FAILURES = _counter(
    "quire_loan_failures_total",
    "loans",
    "Loans that ended badly, by cause; each shard's part counts",
    "cause",
)
TRANSFERRED_BYTES = _counter(
    "quire_transferred_bytes_total",
    "bytes",
    "Page bytes sent to or received from other replicas",
    "direction",
)
SAVED_BYTES = _counter(
    "quire_transfer_saved_bytes_total",
    "bytes",
    "What the received blocks would have been in bf16, less what they are",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since the engine's start and gauges of now; sums that follow from them are properties."""

    running: int = series(RUNNING)
    queued: int = series(WAITING)
    preemptions: int = series(PREEMPTIONS)
    requests_finished: int = series(ENGINE_REQUESTS, outcome="finished")
    requests_failed: int = series(ENGINE_REQUESTS, outcome="failed")
    requests_cancelled: int = series(ENGINE_REQUESTS, outcome="cancelled")
    steps: int = series(STEPS)
    step_part_seconds: Mapping[str, float] = series(STEP_SECONDS, part=Part)

    prompt_tokens: int = series(PROMPT_TOKENS, source="computed")
    local_tokens: int = series(PROMPT_TOKENS, source="local")
    host_tokens: int = series(PROMPT_TOKENS, source="host")
    remote_tokens: int = series(PROMPT_TOKENS, source="remote")
    output_tokens: int = series(OUTPUT_TOKENS)
    nonfinite_outputs: int = series(NONFINITE)
    pages_used: int = series(PAGES, state="used")
    pages_cached: int = series(PAGES, state="cached")
    pages_free: int = series(PAGES, state="free")
    host_blocks: int = series(HOST_BLOCKS, state="used")
    host_free: int = series(HOST_BLOCKS, state="free")
    demoted_blocks: int = series(HOST_COPIES, way="demoted")
    promoted_blocks: int = series(HOST_COPIES, way="promoted")
    dropped_blocks: int = series(HOST_COPIES, way="dropped")

    fetches: int = series(FETCHES)
    fetch_seconds: float = series(FETCH_SECONDS)
    fetch_choices: Mapping[str, int] = series(FETCH_CHOICES, choice=Choice)
    fetch_failures: Mapping[str, int] = series(FETCH_FAILURES, cause=Cause)
    fetched_blocks: int = series(FETCHED_BLOCKS)
    loans: int = series(LOANS)
    loan_failures: Mapping[str, int] = series(LOAN_FAILURES, cause=Cause)
    bytes_received: int = series(TRANSFERRED_BYTES, direction="received")
    bytes_sent: int = series(TRANSFERRED_BYTES, direction="sent")
    bytes_saved: int = series(SAVED_BYTES)

    @property
    def pages_total(self) -> int:
        """Pages of the pool."""
        return self.pages_used + self.pages_cached + self.pages_free

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was found rather than computed."""
        return self.local_tokens + self.host_tokens + self.remote_tokens

    @property
    def step_seconds(self) -> float:
        """Time spent in steps."""
        return sum(self.step_part_seconds.values())

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens for each second spent in steps; 0 before the first step."""
        return self.output_tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def failed_fetches(self) -> int:
        """Fetches that ended in computing."""
        return sum(self.fetch_failures.values())
