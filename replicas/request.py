"""What goes into an engine and what comes out: requests, sampling parameters, events.

Plain values: to read them is to read what the engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, NewType

from quire.kvstore.peers.ids import ReplicaId
from quire.replicas import values
from quire.replicas.errors import InvalidRequest, Status

RequestId = NewType("RequestId", str)


MAX_LOGPROBS = 20
MAX_N = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 64
MAX_PRIORITY = 100
MAX_NAME_CHARACTERS = 256
"""The longest tenant and the longest request id of a client."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to stop. By default: up to 128 tokens, as the model recommends.

    NumPy numbers and lists are taken and kept as plain Python values. Raises InvalidRequest, which names the
    parameter.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    """No stop of any kind before this many tokens."""
    temperature: float | None = None
    """0: greedy. None, here and below: the model's default (`ModelInfo.sampling`)."""
    top_k: int | None = None
    """Keep the k most probable tokens; 0: all."""
    top_p: float | None = None
    """Keep the most probable tokens whose probabilities reach this sum."""
    min_p: float | None = None
    """Drop tokens below this share of the most probable one's probability."""
    repetition_penalty: float | None = None
    """Divides positive logits of tokens seen in prompt or output, multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the output."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token is already in the output."""
    seed: int | None = None
    """Same seed, same request, same tokens; None: drawn by the engine. Any 64 bits."""
    stop: tuple[str, ...] = ()
    """Output ends before any of these texts; a single text is one of them."""
    stop_token_ids: tuple[int, ...] = ()
    """Output ends with any of these tokens, besides the model's own end tokens."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log-probability of each output token and of this many most probable ones; None: off."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens from the second on. The prompt is then computed again."""
    n: int = 1
    """How many independent outputs; they share the prompt's pages."""

    def __post_init__(self) -> None:
        for name, rule in _RULES.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                object.__setattr__(self, name, rule(name, value))
        object.__setattr__(self, "stop", _stop(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must be in 0..max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling(SamplingParams):
    """Sampling parameters that leave nothing to the model's defaults. By themselves greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def resolved(asked: SamplingParams, defaults: ResolvedSampling) -> ResolvedSampling:
    """The parameters that were asked for, and the model's defaults for the others."""
    values = {field.name: getattr(asked, field.name) for field in fields(SamplingParams)}
    for name in DEFAULTED:
        if values[name] is None:
            values[name] = getattr(defaults, name)
    return ResolvedSampling(**values)


DEFAULTED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Parameters for which a model may have its own defaults."""

_MAY_BE_NONE = {*DEFAULTED, "seed", "logprobs", "prompt_logprobs"}


def _whole(least: int, most: int) -> Callable[[str, Any], int]:
    return lambda name, value: values.whole(name, value, least, most)


def _number(holds: Callable[[float], bool], words: str) -> Callable[[str, Any], float]:
    def rule(name: str, value: Any) -> float:
        number = values.finite(name, value)
        if not holds(number):
            raise InvalidRequest(f"{name} must {words}, got {number}")
        return number

    return rule


_PENALTY = _number(lambda x: abs(x) <= 2, "be in -2..2")
_RULES: dict[str, Callable[[str, Any], object]] = {
    "max_tokens": _whole(1, values.MAX_UINT32),
    "min_tokens": _whole(0, values.MAX_UINT32),
    "temperature": _number(lambda x: x == 0 or 0.001 <= x <= 100, "be 0 (greedy) or in 0.001..100"),
    "top_k": _whole(0, values.MAX_UINT32),
    "top_p": _number(lambda x: 0 < x <= 1, "be in (0, 1]"),
    "min_p": _number(lambda x: 0 <= x <= 1, "be in [0, 1]"),
    "repetition_penalty": _number(lambda x: 0.01 <= x <= 100, "be in 0.01..100"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "seed": _whole(0, values.MAX_UINT64),
    "ignore_eos": values.flag,
    "logprobs": _whole(0, MAX_LOGPROBS),
    "prompt_logprobs": _whole(0, MAX_LOGPROBS),
    "n": _whole(1, MAX_N),
}


def _stop(value: Any) -> tuple[str, ...]:
    """None: no stop texts."""
    stops = values.texts("stop", () if value is None else value, MAX_STOP_CHARACTERS)
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop holds {len(stops)} texts; at most {MAX_STOPS} are taken")
    if "" in stops:
        raise InvalidRequest("stop must not contain an empty text")
    return stops


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    """None: no stop tokens."""
    ids = values.token_ids("stop_token_ids", () if value is None else value)
    if len(ids) > MAX_STOP_TOKENS:
        raise InvalidRequest(f"stop_token_ids holds {len(ids)} ids; at most {MAX_STOP_TOKENS} are taken")
    return ids


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
    """The most probable tokens, best first."""


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
    begun: bool = False
    """Whether it was being computed when the engine ended: it may be what ended the engine."""


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
    sampling: ResolvedSampling = field(default_factory=ResolvedSampling)
    """What a request gets that says nothing else."""
