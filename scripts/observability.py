"""Generates what is watched, from `cluster/metrics/`. Run by `make observability`; a test runs it again.

Tables of pages stand between two markers; the prose around them is written by hand.
"""

import re
from pathlib import Path

from quire.cluster.metrics.catalogue import CATALOGUE, Metric, Origin

ROOT = Path(__file__).parent.parent


def generate(into: Path) -> None:
    """Writes everything under `into`, which mirrors the repository."""
    tables = {f"metrics of {origin}s": metrics_table(origin) for origin in Origin}
    _write(into / "docs/metrics.md", fill((ROOT / "docs/metrics.md").read_text(), tables))


def metrics_table(origin: Origin) -> str:
    rows = [_metric_row(metric) for metric in CATALOGUE if metric.origin is origin]
    return "\n".join(["| metric | type | unit | labels | meaning |", "|---|---|---|---|---|", *rows])


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with what stands between the markers of each table replaced."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by `make observability` -->", f"<!-- end of {name} -->"
        page, count = re.subn(
            f"{re.escape(begin)}.*?{re.escape(end)}",
            lambda _, text=f"{begin}\n{table}\n{end}": text,
            page,
            flags=re.DOTALL,
        )
        assert count == 1, f"no place for {name}"
    return page


def _metric_row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.exported}` | {metric.kind} | {metric.unit} | {labels} | {metric.meaning} |"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    generate(ROOT)
