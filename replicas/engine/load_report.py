"""How busy an engine is and how quick: what gateways are told, to choose well among replicas.

Measured on the engine's thread; a `LoadReport` is a value that any thread may have.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.kvstore.peers.cost import Average, PrefillPace

_PREFILL_MEMORY = 64.0
"""Full steps of prefill that count."""
_STEP_MEMORY = 32.0
_SEQUENCE_MEMORY = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One moment of a replica. Paces are averages of what was measured lately; 0 where nothing was."""

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
    """At the beginning of a prompt, whatever else shared the steps included."""
    prefill_s_per_token_before: float = 0.0
    """What each token that stands before it adds."""
    step_s: float = 0.0
    hold_s: float = 0.0
    """For so long a sequence holds its pages."""
    fetch_s: float = 0.0
    """Of a fetch from a neighbour, before its first byte."""
    fetch_s_per_token: float = 0.0
    """0 also where nothing is shared."""


class Pace:
    """What an engine measures of itself as it goes."""

    def __init__(self) -> None:
        self._prefill = PrefillPace(_PREFILL_MEMORY)
        self._step = Average(_STEP_MEMORY)
        self._hold = Average(_SEQUENCE_MEMORY)

    def stepped(self, seconds: float, prompt_tokens: int, before: float) -> None:
        """A step took so long and computed so many tokens of prompts, which stood behind so many others."""
        self._step.add(seconds)
        if prompt_tokens and seconds > 0:
            self._prefill.add(prompt_tokens, seconds, before)

    def released(self, seconds: float) -> None:
        """A sequence has ended, that held pages for so long."""
        self._hold.add(seconds)

    def numbers(self) -> dict[str, float]:
        """Its part of a `LoadReport`."""
        base, slope = self._prefill.line if self._prefill.known else (0.0, 0.0)
        return {
            "prefill_s_per_token": base,
            "prefill_s_per_token_before": slope,
            "step_s": self._step.value if self._step.known else 0.0,
            "hold_s": self._hold.value if self._hold.known else 0.0,
        }
