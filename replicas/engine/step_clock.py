"""Where an engine's time goes: who ends a part of a step says so, and the time since the last word is its."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum


class Part(StrEnum):
    """Together they are all of the time an engine spends in steps."""

    PLAN = "plan"  # deadlines, news of the store, prefixes, the schedule
    FORWARD = "forward"  # laying the step out and running it; on one GPU only launching it
    SAMPLE = "sample"  # drawing tokens; on one GPU also the wait for the step before
    EMIT = "emit"  # publishing blocks, text, events


class StepClock:
    """Laps of one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s = 0.0
        self._seconds = dict.fromkeys(Part, 0.0)

    def start(self) -> None:
        """A step begins."""
        self._since_s = self._clock()

    def ended(self, part: Part) -> None:
        """What was done since the last word was `part`."""
        now = self._clock()
        self._seconds[part] += now - self._since_s
        self._since_s = now

    @property
    def seconds(self) -> Mapping[str, float]:
        """By part, since the engine's start."""
        return {part.value: seconds for part, seconds in self._seconds.items()}
