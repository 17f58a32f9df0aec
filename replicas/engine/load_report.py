"""How busy and how fast an engine is, by which gateways choose among replicas."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The load of a replica at one moment. Times are averages of recent measurements, 0 before the first."""

    taken: int = 0
    """Requests that the engine has taken in since its start."""
    queued_tokens: int = 0
    """Prompt tokens still to be computed, of all sequences; those known to be in its cache do not count."""
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    host_slots: int = 0
    prefill_s_per_token: float = 0.0
    """Seconds to compute a token at the beginning of a prompt, whatever else shared the steps included."""
    prefill_s_per_token_before: float = 0.0
    """Seconds that each token before it in the context adds to that."""
    step_s: float = 0.0
    hold_s: float = 0.0
    """How long a sequence holds its pages."""
    fetch_s: float = 0.0
    """Latency of a fetch from another replica: the time until its first byte."""
    fetch_s_per_token: float = 0.0
    """Also 0 where nothing is shared."""
