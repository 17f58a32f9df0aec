"""Rows of one card and day in one file, and what changed against earlier ones."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.rows import Row

RESULTS = Path(__file__).parents[1] / "results"
_SLOWER = 1.15
"""Two runs of one build differed by up to 12 % (matrix rates: the card's power limit), most by under 3 %."""


def file_for(device: str, date: str, folder: Path = RESULTS) -> Path:
    """`<gpu>-<date>.json`; date as 2026-01-31."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', device.lower())}-{date}.json"


def save(rows: Sequence[Row], file: Path) -> None:
    """Rows of a case and metric that the file has already take the place of the old ones."""
    kept = {(row.case, row.metric): row for row in [*load(file), *rows]}
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps([asdict(row) for row in kept.values()], indent=1) + "\n")


def load(file: Path) -> list[Row]:
    return [Row(**fields) for fields in json.loads(file.read_text())] if file.exists() else []


def rows_before(file: Path) -> list[Row]:
    """The newest row of every case and metric among the same card's results of earlier dates.

    A run may have measured a few parts only: what it left out is compared with an older one.
    """
    card = file.stem[: -len("-2026-01-31")]
    earlier = sorted(f for f in file.parent.glob(f"{card}-????-??-??.json") if f.name < file.name)
    newest = {(row.case, row.metric): row for each in earlier for row in load(each)}
    return list(newest.values())


def regressions(rows: Sequence[Row], before: Sequence[Row]) -> list[str]:
    """A line for every time that grew and every rate that fell by more than 15 %, in the order of `rows`.

    A row is compared by its ratio to the baseline or ceiling of its own run where both runs had the same one,
    for cards of one kind differ; else by its value.
    """
    old = {(row.case, row.metric): row for row in before}
    lines = []
    for row in rows:
        if (was := old.get((row.case, row.metric))) is None:
            continue
        same = row.baseline == was.baseline and row.baseline != "itself"
        new_value, old_value = (row.ratio, was.ratio) if same else (row.value, was.value)
        growth = new_value / old_value
        slower = growth if row.unit in ("ms", "s") else 1 / growth
        if slower > _SLOWER:
            change = f"{was.value:.4g} -> {row.value:.4g} {row.unit}, {slower:.2f} x worse"
            lines.append(f"{row.case} {row.metric}: {change}")
    return lines
