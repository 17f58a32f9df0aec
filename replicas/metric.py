"""What a metric is, and how a value says which metrics its fields are.

A field made by `series` names its metric; `samples_of` reads all such fields of a value. Nothing else has to
be written for a counter to reach Prometheus and docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    COUNTER = "counter"  # only ever grows, until its process ends
    GAUGE = "gauge"  # of now
    HISTOGRAM = "histogram"  # one observation for each request


class Origin(StrEnum):
    """Which processes publish a metric: each has a series for every combination of labels."""

    GATEWAY = "gateway"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. The unit is part of the name, as Prometheus wants it."""

    name: str
    kind: Kind
    origin: Origin
    unit: str
    """Also where the name does not tell: requests, pages, ..."""
    meaning: str
    labels: tuple[str, ...] = ()
    """Labels of few values each."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a metric is now; for a counter, the whole since its process started."""

    metric: Metric
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Series:
    metric: Metric
    labels: Mapping[str, str]
    by: tuple[str, tuple[str, ...]] | None
    """The label that a mapping's keys are values of, and all its values."""


def series(metric: Metric, **labels: str | type[StrEnum]) -> Any:
    """A dataclass field that holds one series of the metric, 0 by default.

    A label that is given an enumeration makes it a mapping from the enumeration's values to numbers: one
    series each, also for values that the mapping lacks, so that a first event shows as an increase from 0.
    """
    fixed, by = {}, None
    for name, label in labels.items():
        if isinstance(label, str):
            fixed[name] = label
        else:
            by = name, tuple(member.value for member in label)
    metadata = {"series": _Series(metric, fixed, by)}
    return field(default_factory=dict, metadata=metadata) if by else field(default=0, metadata=metadata)


def samples_of(value: Any, **others: str) -> Iterator[Sample]:
    """All series of a value but those that are None. `others`: labels that depend on more than the value."""
    for one in fields(value):
        shown, number = one.metadata.get("series"), getattr(value, one.name)
        if shown is None or number is None:
            continue
        labels = others | shown.labels
        name, keys = shown.by or ("", ("",))
        for key in keys:
            given = labels | {name: key}
            amount = number.get(key, 0) if shown.by else number
            yield Sample(shown.metric, amount, {label: given[label] for label in shown.metric.labels})
