"""What an engine counts and measures of itself, and what it tells: its stats, its load, its pressure.

The engine says what happens, on its own thread; nothing here decides anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

from quire.kvstore.peers.cost import Average
from quire.replicas.engine.blocks import BlockStore
from quire.replicas.engine.jobs import LaunchedStep
from quire.replicas.engine.load_report import LoadReport
from quire.replicas.engine.pressure import Load, Pressure, PressureGauge
from quire.replicas.engine.sequence import Progress, Sequence
from quire.replicas.engine.step_clock import StepClock
from quire.replicas.stats import EngineStats

Sequences = Collection[Sequence]

_STEP_MEMORY = 32.0
"""Steps that count for their mean time."""
_HOLD_MEMORY = 64.0
"""Sequences that count for the mean time that one holds its pages."""


class Meter:
    """The measurements of one engine. Times are on the engine's clock."""

    def __init__(
        self, blocks: BlockStore, *, max_running: int, page_tokens: int, clock: Callable[[], float]
    ) -> None:
        self.time = StepClock(clock)
        self.counts: Counter[str] = Counter()
        """What has happened, by the names of `EngineStats`."""
        self._blocks, self._max_running, self._page_tokens = blocks, max_running, page_tokens
        self._step, self._hold = Average(_STEP_MEMORY), Average(_HOLD_MEMORY)
        self._gauge = PressureGauge(pages=blocks.pool.total, max_running=max_running)
        self._taken = 0
        self._absorbed_s = 0.0
        self.load = self._report((), ())
        """Replaced as a whole, as `pressure` is: any thread may read it."""

    @property
    def pressure(self) -> Pressure:
        return self._gauge.latest

    def stats(self, running: int, queued: int) -> EngineStats:
        return EngineStats(
            **self._blocks.numbers(),
            **dict[str, Any](self.counts),
            step_part_seconds=self.time.seconds,
            running=running,
            queued=queued,
        )

    def queued_tokens(self, running: Sequences, waiting: Sequences) -> int:
        """Prompt tokens to compute, except those of sequences whose prefix may yet be fetched."""
        ready = (seq for seq in waiting if not self._blocks.waits.is_waiting(seq.id))
        todo = sum(seq.length - seq.found_blocks * self._page_tokens for seq in ready)
        return todo + _to_compute(running)

    # ---- what happens

    def taken(self) -> None:
        """A request has come, to be served or refused."""
        self._taken += 1

    def admitted(self, seq: Sequence) -> None:
        """The first sequence of a request has got its pages."""
        self.counts.update(seq.hits())

    def launched(self, step: LaunchedStep) -> None:
        """The step is under way."""
        self.counts["steps"] += 1
        self.counts["prompt_tokens"] += step.prompt_tokens

    def computed(self, step: LaunchedStep, now_s: float) -> None:
        """The step is done, and took all of the time since the one before it."""
        seconds = now_s - max(step.launched_s, self._absorbed_s)
        self._absorbed_s = now_s
        self._step.add(seconds)
        self._blocks.waits.prefilled(step.prompt_tokens, seconds, step.prompt_before, now_s)
        self._gauge.prefilled(step.prompt_tokens, now_s)

    def first_token(self, progress: Progress, now_s: float) -> None:
        """The request has its first token."""
        self._gauge.first_token(now_s - progress.submitted_s, now_s)

    def finished(self, progress: Progress, now_s: float) -> None:
        """A sequence of the request has its last token."""
        if progress.admitted_s is not None:
            self._hold.add(now_s - progress.admitted_s)

    def stepped(self, running: Sequences, waiting: Sequences, now_s: float) -> None:
        """Refresh the published load report and pressure after a step."""
        self._gauge.update(lambda: self._load(running, waiting), now_s)
        self.load = self._report(running, waiting)

    # ---- what is told

    def _report(self, running: Sequences, waiting: Sequences) -> LoadReport:
        pool, waits = self._blocks.pool, self._blocks.waits
        prefill_s, prefill_s_before = waits.prefill.line if waits.prefill.known else (0.0, 0.0)
        fetch_s, fetch_s_per_token = waits.fetch_pace or (0.0, 0.0)
        return LoadReport(
            taken=self._taken,
            queued_tokens=self.queued_tokens(running, waiting),
            running=len(running),
            waiting=len(waiting),
            max_running=self._max_running,
            pages_total=pool.total,
            pages_free=pool.free,
            pages_cached=pool.cached,
            host_slots=self._blocks.host.slots,
            prefill_s_per_token=prefill_s,
            prefill_s_per_token_before=prefill_s_before,
            step_s=self._step.value if self._step.known else 0.0,
            hold_s=self._hold.value if self._hold.known else 0.0,
            fetch_s=fetch_s,
            fetch_s_per_token=fetch_s_per_token,
        )

    def _load(self, running: Sequences, waiting: Sequences) -> Load:
        """Shared pages count once where they are held; those that wait may find some of theirs here."""
        requests = [seq.progress for seq in (*running, *waiting)]
        return Load(
            pages=self._blocks.pool.used + sum(-(-seq.length // self._page_tokens) for seq in waiting),
            sequences=len(requests),
            prompt_tokens=_to_compute(running) + _to_compute(waiting),
            prefill_tokens_s=self._blocks.waits.prefill.tokens_s,
            oldest_s=min((p.submitted_s for p in requests if p.first_token_s is None), default=None),
        )


def _to_compute(sequences: Sequences) -> int:
    """Prompt tokens left to compute; a sequence that has only one left decodes."""
    left = (seq.length - seq.computed for seq in sequences)
    return sum(tokens for tokens in left if tokens > 1)
