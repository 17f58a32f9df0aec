"""Measures the parts of an engine's steps: time since the last report belongs to the part that ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum


class Part(StrEnum):
    """The parts of a step; together they are all of its time."""

    PLAN = "plan"  # deadlines, results of the store, prefixes, the schedule
    FORWARD = "forward"  # laying the step out and running it; on one GPU only launching it
    SAMPLE = "sample"  # drawing tokens; on one GPU also the wait for the step before
    EMIT = "emit"  # publishing blocks, text, events


class StepClock:
    """The laps of one thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since_s = 0.0
        self._seconds = dict.fromkeys(Part, 0.0)

    def start(self) -> None:
        """Start a step."""
        self._since_s = self._clock()

    def ended(self, part: Part) -> None:
        """Add the time since the last call to `part`."""
        now = self._clock()
        self._seconds[part] += now - self._since_s
        self._since_s = now

    @property
    def seconds(self) -> Mapping[str, float]:
        """Return the seconds of each part since the engine's start."""
        return {part.value: seconds for part, seconds in self._seconds.items()}
