"""A served application on a Ray cluster that a real Prometheus scrapes, for tests."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_cluster import START_S, Cluster, running, until
from served_app import Served, free_port, quire_serve

SCRAPE_S = 1
_PROMETHEUS = """
global: {{scrape_interval: {scrape}s, evaluation_interval: {scrape}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: ray
    file_sd_configs: [{{files: [{targets}], refresh_interval: 1s}}]
"""


class Prometheus:
    """Asked over its HTTP API."""

    def __init__(self, address: str) -> None:
        self._address = address

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query. Raises AssertionError, with what Prometheus says, if it is none."""
        return self._get("query", query=expression)["result"]

    def alerts(self) -> dict[str, str]:
        """Active alerts by name: pending or firing."""
        found: dict[str, str] = {}
        for alert in self._get("alerts")["alerts"]:
            name, state = alert["labels"]["alertname"], alert["state"]
            found[name] = "firing" if "firing" in (state, found.get(name)) else state
        return found

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def metadata(self) -> dict[str, list[dict[str, str]]]:
        return self._get("metadata")

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=10):
                return True
        except OSError:  # not listening yet, or 503: still reading its own files
            return False

    def _get(self, what: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error


@contextmanager
def observed_app(
    cluster: Cluster, rules: Path, extra_targets: list[str], **changes: dict[str, object]
) -> Iterator[tuple[Served, Prometheus]]:
    """`quire serve` on a cluster and Prometheus beside it, up until the context ends.

    `rules`: a file of alert rules; `extra_targets`: scraped beside Ray's.
    """
    with (
        _prometheus(cluster, rules, extra_targets) as prometheus,
        quire_serve(cluster.folder, ray_address=cluster.address, **changes) as served,
    ):
        served.process = cluster.process  # below it are those of an application
        yield served, prometheus


@contextmanager
def _prometheus(cluster: Cluster, rules: Path, extra: list[str]) -> Iterator[Prometheus]:
    folder = cluster.folder
    (folder / "extra.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": extra}]))
    targets = f"{folder}/ray/prom_metrics_service_discovery.json, {folder}/extra.json"
    config = folder / "prometheus.yml"
    config.write_text(_PROMETHEUS.format(scrape=SCRAPE_S, rules=rules, targets=targets))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as out, running(command, out, {}):
        found = Prometheus(address)
        until(found.ready, START_S)
        yield found
