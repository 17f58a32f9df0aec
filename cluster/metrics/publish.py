"""Publishes samples as Ray's metrics, which every node's endpoint exports to Prometheus.

Ray drops a gauge some 20 s after it was last set, so a thread sets all of them again every two seconds. Ray
Serve labels the metrics with application, deployment and replica.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

from quire.cluster.metrics.samples import replica_samples
from quire.replicas.metric import Kind, Metric, Sample

if TYPE_CHECKING:  # a gateway publishes too, and loads no model's code
    from quire.replicas.config import EngineConfig
    from quire.replicas.engine.async_engine import AsyncEngine

_PERIOD_S = 2.0

log = logging.getLogger(__name__)

Series = tuple[Metric, tuple[tuple[str, str], ...]]


class _Counter(metrics.Counter):
    """A counter of Ray that may start at 0.

    `inc` refuses 0; but a series that begins with its first event shows Prometheus no increase.
    """

    def add(self, value: float, tags: dict[str, str]) -> None:
        self._record(value, tags=tags)


def publish_replica(engine: AsyncEngine, config: EngineConfig) -> Publisher:
    """Publish a replica's metrics until closed."""

    def samples() -> Iterable[Sample]:
        return replica_samples(
            engine.stats(), engine.info, config.scheduler, engine.pressure(), alive=engine.healthy
        )

    return Publisher(samples)


class Publisher:
    """Publishes the metrics of one process."""

    def __init__(self, samples: Callable[[], Iterable[Sample]], *, period_s: float = _PERIOD_S) -> None:
        """Call `samples` every `period_s` in its own thread until `close`."""
        self._samples = samples
        self._period_s = period_s
        self._instruments: dict[Metric, Any] = {}
        self._said: dict[Series, float] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-metrics", daemon=True)
        self._thread.start()

    def observe(self, metric: Metric, value: float) -> None:
        """Add an observation to a histogram. From any thread; takes some microseconds."""
        self._instrument(metric).observe(value)

    def close(self) -> None:
        """Stop publishing; Ray drops the gauges."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                for sample in self._samples():
                    self._say(sample)
            except Exception:  # errors of metrics must not stop what they measure
                log.exception("metrics could not be published; trying again")
            if self._closing.wait(self._period_s):
                return

    def _say(self, sample: Sample) -> None:
        tags = dict(sample.labels)
        instrument = self._instrument(sample.metric)
        if sample.metric.kind is Kind.GAUGE:
            instrument.set(sample.value, tags=tags)
            return
        series = (sample.metric, tuple(sorted(tags.items())))
        before = self._said.get(series)
        if before is None or sample.value > before:
            instrument.add(sample.value - (before or 0.0), tags)
            self._said[series] = sample.value

    def _instrument(self, metric: Metric) -> Any:
        with self._lock:
            made = self._instruments.get(metric)
            if made is None:
                made = self._instruments[metric] = _make(metric)
            return made


def _make(metric: Metric) -> Any:
    kinds: Mapping[Kind, Any] = {
        Kind.COUNTER: _Counter,
        Kind.GAUGE: metrics.Gauge,
        Kind.HISTOGRAM: partial(metrics.Histogram, boundaries=list(metric.buckets)),
    }
    return kinds[metric.kind](metric.name, description=metric.meaning, tag_keys=metric.labels)
