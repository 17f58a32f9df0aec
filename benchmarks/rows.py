"""What every benchmark shares: measure in alternating rounds, take medians, print and save one row per case.

A candidate and its baseline are measured in the same run, a round of each in turn, because the load of a
machine drifts: figures of different runs are not compared.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

__all__ = ["Row", "alternate", "median", "merge", "report", "timed"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `ratio` is value / the baseline's value in the same unit."""

    case: str
    metric: str
    value: float
    unit: str
    baseline: str
    ratio: float


def alternate(calls: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """What each call returned in each round. A call is given the round's number, counted from 0.

    Every round has an order of its own, the same in every run: what a call leaves behind, in caches or in a
    processor's clock, meets each of the others.
    """
    results: dict[str, list[float]] = {name: [] for name in calls}
    orders = random.Random(0)
    for number in range(rounds):
        for name in orders.sample(list(calls), len(calls)):
            results[name].append(calls[name](number))
    return results


def timed(call: Callable[[], object], device: str, repeat: int = 1) -> Callable[[int], float]:
    """Seconds of one `call`, as `alternate` wants it: the mean of `repeat`, until the device is idle."""

    def seconds(_: int) -> float:
        _finish(device)
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        _finish(device)
        return (time.perf_counter() - start) / repeat

    return seconds


def report(rows: Sequence[Row], file: Path | None) -> None:
    """Print one line per row; write all of them to `file` as a JSON list of objects, if given."""
    width = max((len(row.case) for row in rows), default=0)
    for row in rows:
        against = f"{row.ratio:6.2f} x {row.baseline}"
        print(f"{row.case:{width}}  {row.metric} {row.value:10.4g} {row.unit}  {against}", flush=True)
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def merge(rows: Sequence[Row], file: Path) -> None:
    """Write to a file of several benchmarks: rows of a case and metric that it has already are replaced."""
    old = [Row(**fields) for fields in json.loads(file.read_text())] if file.exists() else []
    kept = {(row.case, row.metric): row for row in [*old, *rows]}
    file.write_text(json.dumps([asdict(row) for row in kept.values()], indent=1) + "\n")


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
