"""Generates dashboards, alerts and their pages from the files beside it and the catalogue of metrics.

Run by `make observability`; a test runs it again.

Tables of pages are between two markers; the prose around them is written by hand.
"""

import re
import textwrap
from pathlib import Path

import yaml
from observability.alerts import Alert, alerts
from observability.capacity import CAPACITY
from observability.grafana import dashboard_json
from observability.operators import OPERATORS
from observability.panels import Dashboard

from quire.cluster.metrics.catalogue import CATALOGUE
from quire.replicas.metric import Metric, Origin

ROOT = Path(__file__).parents[2]

_RULES_HEAD = "# Made of deploy/observability/alerts.py by `make observability`; see docs/dashboards.md.\n"
_RUNBOOKS = "docs/dashboards.md"
"""The page with a section for each alert; put the URL here under which your people read it."""


def generate(into: Path) -> None:
    """Writes everything under `into`, which mirrors the repository."""
    tables = {f"metrics of {origin}s": metrics_table(origin) for origin in Origin}
    _write(into / "docs/metrics.md", fill((ROOT / "docs/metrics.md").read_text(), tables))
    tables = {"rows of operators": rows_table(OPERATORS), "rows of capacity": rows_table(CAPACITY)}
    tables["alerts"] = runbook(alerts())
    _write(into / "docs/dashboards.md", fill((ROOT / "docs/dashboards.md").read_text(), tables))
    for dashboard in (OPERATORS, CAPACITY):
        _write(into / f"deploy/grafana/{dashboard.uid}.json", dashboard_json(dashboard))
    _write(into / "deploy/prometheus/quire.rules.yml", _RULES_HEAD + rules_yaml(alerts()))


def rules_yaml(chosen: tuple[Alert, ...]) -> str:
    """A rule file of Prometheus."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.hold,
            "labels": {"severity": alert.severity.value},
            "annotations": {
                "summary": alert.summary,
                "description": alert.action,
                "runbook_url": f"{_RUNBOOKS}#{alert.name.lower()}",
            },
        }
        for alert in chosen
    ]
    tree = {"groups": [{"name": "quire", "rules": rules}]}
    return str(yaml.safe_dump(tree, sort_keys=False, width=110))


def metrics_table(origin: Origin) -> str:
    rows = [_metric_row(metric) for metric in CATALOGUE if metric.origin is origin]
    return "\n".join(["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|", *rows])


def rows_table(dashboard: Dashboard) -> str:
    rows = [
        f"| **{row.title}** | {', '.join(panel.title for panel in row.panels)} | {row.meaning} |"
        for row in dashboard.rows
    ]
    return "\n".join(["| row | panels | what it tells |", "|---|---|---|", *rows])


def runbook(chosen: tuple[Alert, ...]) -> str:
    """A section for each: when, and what to do."""
    sections = []
    for alert in chosen:
        held = "at once" if alert.hold == "0s" else f"after {alert.hold}"
        when = f"*{alert.severity.value.capitalize()}, {held}.* {_plain(alert.summary)}."
        sections += [f"### {alert.name}", _wrapped(when), _wrapped(alert.action)]
    return "\n\n".join(sections)


def fill(page: str, tables: dict[str, str]) -> str:
    """Replace the text between the markers of each table in a page."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by `make observability` -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        assert found, f"no place for {name}"
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def _metric_row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _plain(summary: str) -> str:
    """Without Prometheus' templates."""
    text = re.sub(r"{{ \$labels\.application }}: ", "", summary)
    text = re.sub(r"{{ \$labels\.(\w+) }}", r"*\1*", text)
    text = re.sub(r"{{ \$value[^}]*}}", "*value*", text)
    return text[0].upper() + text[1:]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    generate(ROOT)
