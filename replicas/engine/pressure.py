"""Measures the load of a replica for autoscaling. Knows no clock and no cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quire.replicas import stats
from quire.replicas.metric import series

_PERIOD_S = 0.2
"""How often the load is measured."""
_USE_WINDOW_S = 5.0
_FIRST_TOKEN_WINDOW_S = 10.0
_FIRST_TOKENS = 512
"""The most TTFTs that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """The load of a replica at one moment. All but `first_token_s` are divided among replicas."""

    occupancy: float = series(stats.OCCUPANCY)
    """Pages that sequences hold or, while they wait, will need for their tokens, as a share of the pool; or
    sequences as a share of scheduler.max_running if that is scarcer. What is merely cached does not count;
    above 1 some wait for pages or a slot."""
    prefill_queue_s: float = series(stats.PREFILL_QUEUE)
    """Seconds to compute the prompt tokens that are still to be computed, at the measured rate."""
    prefill_use: float = series(stats.PREFILL_USE)
    """Prompt tokens computed in the last seconds, as a share of what that rate could have computed."""
    first_token_s: float = series(stats.RECENT_FIRST_TOKEN)
    """TTFT: the 90th percentile of the last seconds, or the age of the request that waits for its first token
    longest, if that is more."""


@dataclass(frozen=True, slots=True)
class Load:
    """The pages and backlog of a replica, counted over its sequences."""

    pages: int
    """Number of pages held, or needed once waiting sequences are admitted."""
    sequences: int
    prompt_tokens: int
    """Number of prompt tokens still to be computed."""
    prefill_tokens_s: float | None
    """Prompt tokens that full steps compute in a second; None before the first was measured."""
    oldest_s: float | None
    """When the oldest request without a first token was submitted."""


class PressureGauge:
    """Measures over a replica's last seconds. Owned by the engine; times are on the engine's clock."""

    def __init__(self, *, pages: int, max_running: int) -> None:
        self.latest = Pressure()
        """Replaced as a whole: any thread may read it."""
        self._pages, self._max_running, self._latest_s = pages, max_running, float("-inf")
        self._prefills: deque[tuple[float, int]] = deque()
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_FIRST_TOKENS)

    def prefilled(self, tokens: int, now_s: float) -> None:
        """Record that a step has computed prompt tokens."""
        if tokens:
            self._prefills.append((now_s, tokens))

    def first_token(self, after_s: float, now_s: float) -> None:
        """Record that a request got its first token, `after_s` after its arrival."""
        self._first_tokens.append((now_s, after_s))

    def update(self, load: Callable[[], Load], now_s: float) -> None:
        """Take a new reading, unless the latest is very recent."""
        if now_s >= self._latest_s + _PERIOD_S:
            self.latest, self._latest_s = self.read(load(), now_s), now_s

    def read(self, load: Load, now_s: float) -> Pressure:
        """Compute the pressure; without a measured prefill rate, what depends on it is 0."""
        _forget(self._prefills, now_s - _USE_WINDOW_S)
        _forget(self._first_tokens, now_s - _FIRST_TOKEN_WINDOW_S)
        rate = load.prefill_tokens_s
        recent = sum(tokens for _, tokens in self._prefills)
        waits = 0.0 if load.oldest_s is None else now_s - load.oldest_s
        return Pressure(
            occupancy=max(load.pages / self._pages, load.sequences / self._max_running),
            prefill_queue_s=load.prompt_tokens / rate if rate else 0.0,
            prefill_use=recent / (rate * _USE_WINDOW_S) if rate else 0.0,
            first_token_s=max(_percentile_90(after_s for _, after_s in self._first_tokens), waits),
        )


def _forget(seen: deque[tuple[float, int]] | deque[tuple[float, float]], before_s: float) -> None:
    while seen and seen[0][0] < before_s:
        seen.popleft()


def _percentile_90(values: Iterable[float]) -> float:
    """Return the 90th percentile; 0 of no values."""
    ranked = sorted(values)
    return ranked[-(-9 * len(ranked) // 10) - 1] if ranked else 0.0
