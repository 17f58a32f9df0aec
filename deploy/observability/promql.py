"""Prometheus expressions over the catalogue: a metric that is not in it cannot be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quire.replicas.metric import Metric

Label = str | tuple[str, ...]
"""A value, or any of several."""

NOTHING: Mapping[str, Label] = MappingProxyType({})

TARGET_REPLICAS = 'ray_serve_autoscaling_target_replicas{deployment=~"Replica|Prefill"}'
"""Ray Serve's: how many replicas it wants."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What the expressions are about."""

    window: str
    """Of rates: a duration, or a variable of Grafana's."""
    applications: str = ""
    """A matcher of `application`; none: all."""
    by: str = ""
    """Labels that sums are kept apart by."""
    ago: str = ""
    """How long before now the window ends; none: now."""

    def series(self, metric: Metric, **labels: Label) -> str:
        return self._selected(metric.exported, metric, labels)

    def sum(self, metric: Metric, by: str = "", **labels: Label) -> str:
        return f"sum{self._by(by)} ({self.series(metric, **labels)})"

    def count(self, metric: Metric, by: str = "", **labels: Label) -> str:
        return f"count{self._by(by)} ({self.series(metric, **labels)})"

    def rate(self, metric: Metric, by: str = "", **labels: Label) -> str:
        """Per second, of a counter."""
        return f"sum{self._by(by)} (rate({self._range(self.series(metric, **labels))}))"

    def increase(self, metric: Metric, by: str = "", **labels: Label) -> str:
        """Within the window, of a counter."""
        return f"sum{self._by(by)} (increase({self._range(self.series(metric, **labels))}))"

    def share(self, metric: Metric, among: Mapping[str, Label] = NOTHING, **labels: Label) -> str:
        """Of what a counter counted in the window with the labels `among`, the part with these, too."""
        part, whole = self.increase(metric, "", **among, **labels), self.increase(metric, "", **among)
        return f"{part} / ({whole} > 0)"

    def quantile(self, quantile: float, metric: Metric, by: str = "") -> str:
        """Of a histogram, within the window."""
        buckets = self._selected(f"{metric.exported}_bucket", metric, {})
        grouped = ", ".join(filter(None, ("le", self.by, by)))
        return f"histogram_quantile({quantile:g}, sum by ({grouped}) (rate({self._range(buckets)})))"

    def mean(self, total: Metric, count: Metric) -> str:
        """What one counter counted by what another did, in the window."""
        return f"{self.increase(total)} / ({self.increase(count)} > 0)"

    def _range(self, series: str) -> str:
        return f"{series}[{self.window}]" + (f" offset {self.ago}" if self.ago else "")

    def _selected(self, name: str, metric: Metric, labels: dict[str, Label]) -> str:
        unknown = set(labels) - set(metric.labels)
        assert not unknown, f"{metric.name} has no label {unknown}"
        matchers = [self.applications] if self.applications else []
        for label, value in labels.items():
            matchers.append(
                f'{label}="{value}"' if isinstance(value, str) else f'{label}=~"{"|".join(value)}"'
            )
        return f"{name}{{{', '.join(matchers)}}}" if matchers else name

    def _by(self, by: str) -> str:
        labels = ", ".join(filter(None, (self.by, by)))
        return f" by ({labels})" if labels else ""
