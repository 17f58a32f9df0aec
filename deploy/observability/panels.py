"""Dashboards as data, and expressions that both share; `generate.py` writes Grafana's files."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from observability.promql import TARGET_REPLICAS, Scope

from quire.cluster.metrics import catalogue as c
from quire.replicas.metric import Metric


class Unit(StrEnum):
    """Grafana's names."""

    SECONDS = "s"
    BYTES = "bytes"
    BYTES_S = "Bps"
    SHARE = "percentunit"
    COUNT = "short"
    PER_SECOND = "ops"


@dataclass(frozen=True, slots=True)
class Query:
    expression: str
    legend: str
    """Grafana's form: `{{label}}` is the label's value."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    meaning: str
    unit: Unit
    queries: tuple[Query, ...]
    single: bool = False
    """One number rather than a course."""
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    meaning: str
    """For the page about the dashboards."""
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]


HERE = Scope(window="$__rate_interval", applications='application=~"$application"')
"""What is chosen on the dashboard."""
WANTED = TARGET_REPLICAS.replace("{", '{application=~"$application", ')
POOL_SHARE = f"{HERE.sum(c.PAGES, state='used')} / {HERE.sum(c.PAGES)}"


def hits(*sources: str) -> str:
    """Share of prompt tokens whose KV came from there."""
    return HERE.share(c.PROMPT_TOKENS, source=sources)


def quantiles(metric: Metric, *quantiles: float) -> tuple[Query, ...]:
    """Of a histogram, one course each."""
    return tuple(Query(HERE.quantile(q, metric), f"p{q * 100:g}") for q in quantiles)


def one(title: str, meaning: str, unit: Unit, expression: str) -> Panel:
    """A panel of one number."""
    return Panel(title, meaning, unit, (Query(expression, title),), single=True)
