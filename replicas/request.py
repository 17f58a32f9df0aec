"""What goes into an engine and what comes out: requests, sampling parameters, events.

Plain values. Whoever reads them has read what the engine does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

from quire.kvstore.messages import ReplicaId
from quire.replicas.errors import InvalidRequest, Status

RequestId = NewType("RequestId", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop. The defaults are greedy, up to 128 tokens."""

    max_tokens: int = 128
    min_tokens: int = 0
    """No stop of any kind before so many tokens."""
    temperature: float = 0.0
    """0: greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens below this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen in prompt or output, multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token is already in the output."""
    seed: int | None = None
    """Same seed, same request, same tokens; None: drawn by the engine."""
    stop: tuple[str, ...] = ()
    """Output ends before any of these texts."""
    stop_token_ids: tuple[int, ...] = ()
    """Output ends with any of these tokens, besides the model's own end tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probability of each output token and of this many likeliest ones; None: off."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from the second on. The prompt is then computed anew."""
    n: int = 1
    """Independent outputs; they share the prompt's pages."""

    def __post_init__(self) -> None:
        for rule, holds in {
            f"max_tokens must be at least 1, got {self.max_tokens}": self.max_tokens >= 1,
            f"min_tokens must lie in 0..max_tokens ({self.max_tokens}), got {self.min_tokens}": (
                0 <= self.min_tokens <= self.max_tokens
            ),
            f"temperature must be 0 (greedy) or lie in 0.001..100, got {self.temperature}": (
                self.temperature == 0 or 0.001 <= self.temperature <= 100
            ),
            f"top_k must be 0 (all) or positive, got {self.top_k}": self.top_k >= 0,
            f"top_p must lie in (0, 1], got {self.top_p}": 0 < self.top_p <= 1,
            f"min_p must lie in [0, 1], got {self.min_p}": 0 <= self.min_p <= 1,
            f"repetition_penalty must lie in 0.01..100, got {self.repetition_penalty}": (
                0.01 <= self.repetition_penalty <= 100
            ),
            f"presence_penalty must lie in -2..2, got {self.presence_penalty}": (
                abs(self.presence_penalty) <= 2
            ),
            f"frequency_penalty must lie in -2..2, got {self.frequency_penalty}": (
                abs(self.frequency_penalty) <= 2
            ),
            f"logprobs must lie in 0..{MAX_LOGPROBS}, got {self.logprobs}": _logprobs_ok(self.logprobs),
            f"prompt_logprobs must lie in 0..{MAX_LOGPROBS}, got {self.prompt_logprobs}": (
                _logprobs_ok(self.prompt_logprobs)
            ),
            f"n must lie in 1..{MAX_N}, got {self.n}": 1 <= self.n <= MAX_N,
            "stop must not contain an empty text": "" not in self.stop,
            f"stop holds at most {MAX_STOPS} texts of at most {MAX_STOP_CHARACTERS} characters": (
                len(self.stop) <= MAX_STOPS and all(len(s) <= MAX_STOP_CHARACTERS for s in self.stop)
            ),
            f"stop_token_ids holds at most {MAX_STOP_TOKENS} ids, got {len(self.stop_token_ids)}": (
                len(self.stop_token_ids) <= MAX_STOP_TOKENS
            ),
        }.items():
            if not holds:
                raise InvalidRequest(rule)


MAX_LOGPROBS = 20
MAX_N = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64


def _logprobs_ok(count: int | None) -> bool:
    return count is None or 0 <= count <= MAX_LOGPROBS


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued."""

    id: RequestId
    prompt: tuple[int, ...]
    """Token ids."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Higher goes first; equals in order of arrival."""
    tenant: str = ""
    """Blocks are shared between requests of one tenant only."""
    deadline_s: float | None = None
    """On the engine's clock (time.monotonic of its process); a request still queued then fails."""
    computed_by: ReplicaId | None = None
    """The replica that has just computed the prompt: its blocks are fetched from there."""


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, a stop token or a stop text
    LENGTH = "length"  # max_tokens, or the model's longest sequence
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (before temperature and penalties) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of a request, over all its n outputs."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was found in the pool rather than computed (by the first output)."""
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds since the request was submitted."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step added to one output of a request."""

    request_id: RequestId
    index: int
    """Which of the n outputs."""
    token_ids: tuple[int, ...] = ()
    text: str = ""
    """Whole characters only; may lag behind token_ids while a character or a stop text is incomplete."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """With the first output only."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    """With the last output of the request only: nothing of this request follows."""
    timings: Timings | None = None
    """With usage."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The request ended without its answer; nothing of it follows."""

    request_id: RequestId
    status: Status
    message: str


Event = Output | Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a client may want to know about the model being served."""

    model: str
    architecture: str
    vocab_size: int
    max_model_tokens: int
    eos_token_ids: tuple[int, ...]
    tp: int
    page_tokens: int
    kv_formats: tuple[tuple[str, str], ...]
    """(K, V) codes per layer."""
    bytes_per_token: float
    """Of KV, over all shards, scales and padding counted."""
    bf16_bytes_per_token: float
    """The same in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters since start and gauges of now."""

    running: int = 0
    queued: int = 0
    pages_total: int = 0
    pages_free: int = 0
    """Never used, or given back and not cached."""
    pages_cached: int = 0
    """Hold blocks nobody uses at the moment; evicted when pages are needed."""
    pages_used: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    remote_tokens: int = 0
    """Of those, in blocks that other replicas sent for their request."""
    host_tokens: int = 0
    """Of those, in blocks that came from host memory for their request."""
    output_tokens: int = 0
    nonfinite_outputs: int = 0
    """Outputs given up because the model's logits were not finite."""
    preemptions: int = 0
    requests_finished: int = 0
    requests_failed: int = 0
    requests_cancelled: int = 0
    step_seconds: float = 0.0
    """Time spent in steps."""
    step_part_seconds: Mapping[str, float] = field(default_factory=dict)
    """The same, by part (`step_clock.py`)."""
    demoted_blocks: int = 0
    """That made room in the pool and went to host memory."""
    promoted_blocks: int = 0
    """That came back from there."""
    dropped_blocks: int = 0
    """That made room in the pool and found none in host memory, or made room there."""
    host_blocks: int = 0
    """That are in host memory now."""
    host_slots: int = 0
    """Blocks that host memory takes."""
    fetches: int = 0
    """Asked of other replicas."""
    fetch_seconds: float = 0.0
    """From question to end, summed over them."""
    fetched_blocks: int = 0
    """That came from other replicas."""
    failed_fetches: int = 0
    """That ended in computing."""
    fetch_failures: Mapping[str, int] = field(default_factory=dict)
    """The same, by cause (`kvstore/failures.py`)."""
    loans: int = 0
    """Granted to other replicas."""
    loan_failures: Mapping[str, int] = field(default_factory=dict)
    """Loans that ended badly, by cause; each shard's part counts."""
    fetch_choices: Mapping[str, int] = field(default_factory=dict)
    """How often each choice of fetching and recomputing was taken."""
    bytes_received: int = 0
    """Of pages, from other replicas."""
    bytes_sent: int = 0
    bytes_saved: int = 0
    """What the received blocks would have been in bf16, less what they are."""
