"""What needs a whole model: its decode steps, how many sessions a card holds, and the engine's output rate.

    python -m benchmarks.gpu model --date 2026-01-31

One engine a format, in a process of its own, serves all three (`step.py`, `capacity.py`, `engine.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.gpu.capacity import Capacity, capacity, capacity_rows
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.engine import LOADS, SCHEDULER, Speed, engine_rows, print_bound, speed
from benchmarks.gpu.models import LLAMA_8B
from benchmarks.gpu.shards import in_fresh_process, random_engine, shard_of
from benchmarks.gpu.step import StepTime, step_rows, step_times
from benchmarks.rows import Row

MODEL = LLAMA_8B
POLICIES = ("bf16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one format."""

    steps: list[StepTime]
    capacity: Capacity
    speeds: list[Speed | None]
    """For each of LOADS, None where this format is not asked for."""


def measure(ceilings: Ceilings) -> Iterator[Row]:
    bf16: Figures | None = None
    for policy in POLICIES:
        figures = in_fresh_process(_figures, policy)
        bf16 = bf16 or figures
        for time in figures.steps:
            yield from step_rows(policy, time, ceilings)
        yield from capacity_rows(policy, figures.capacity, bf16.capacity.pool_tokens, ceilings)
        for load, ours, base in zip(LOADS, figures.speeds, bf16.speeds, strict=True):
            if ours and base:
                yield from engine_rows(policy, load, ours, base, ceilings)
    for load, base in zip(LOADS, bf16.speeds if bf16 else (), strict=True):
        if base:
            print_bound(load, base, ceilings)


def _figures(policy: str) -> Figures:
    with random_engine(MODEL, policy, SCHEDULER) as llm:
        steps, held = step_times(shard_of(llm)), capacity(shard_of(llm))
        return Figures(steps, held, [speed(llm, load) if policy in load.policies else None for load in LOADS])
