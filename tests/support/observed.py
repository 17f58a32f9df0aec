"""A served application on a Ray cluster of its own that a real Prometheus scrapes, for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from observability.generate import ROOT
from served_app import Served, free_port, quire_serve

SCRAPE_S = 1
_START_S = 90
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


class Cluster:
    """Processes of a Ray cluster on this machine."""

    def __init__(
        self, process: subprocess.Popen[bytes], folder: Path, environment: Mapping[str, str]
    ) -> None:
        """`folder`: its files are below. `environment`: what commands need to join it."""
        self.process, self.folder, self.environment = process, folder, environment

    def replicas(self) -> list[psutil.Process]:
        """Processes with rank 0 of a replica."""
        return [p for p in self._processes() if ":Replica" in _title(p)]

    @contextmanager
    def application(self, script: Path, *args: str) -> Iterator[str]:
        """One more in this cluster, by a script that prints its address and lives as long as its input."""
        process = subprocess.Popen(
            [sys.executable, str(script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.communicate(timeout=_START_S)

    def _processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@contextmanager
def observed_app(
    rules: Path, extra_targets: list[str], **changes: dict[str, object]
) -> Iterator[tuple[Cluster, Served, Prometheus]]:
    """Up until the context ends. `rules`: a file of alert rules; `extra_targets`: scraped beside Ray's."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))  # Ray's sockets need a short path
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = stack.enter_context(_ray(folder))
        prometheus = stack.enter_context(_prometheus(folder, rules, extra_targets))
        served = stack.enter_context(quire_serve(folder, environment=cluster.environment, **changes))
        yield cluster, served, prometheus


@contextmanager
def _ray(folder: Path) -> Iterator[Cluster]:
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", "--num-cpus=4", "--object-store-memory=100000000"),
        *("--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"),
        *(f"--dashboard-port={free_port()}", f"--temp-dir={folder / 'ray'}"),
    ]
    token = folder / "token"
    token.write_text("tests only, of one private network")
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    shown = folder / "dashboards"
    shutil.copytree(ROOT / "deploy/grafana", shown)
    of_head = {
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(shown),
    }
    log = folder / "ray.log"
    with (
        log.open("wb") as out,
        _running(command, out, {**environment, **of_head}) as process,
    ):
        _when(lambda: "Ray runtime started" in log.read_text())
        yield Cluster(process, folder, {**environment, "RAY_ADDRESS": address})


@contextmanager
def _prometheus(folder: Path, rules: Path, extra: list[str]) -> Iterator[Prometheus]:
    (folder / "extra.json").write_text(json.dumps([{"labels": {"job": "ray"}, "targets": extra}]))
    targets = f"{folder}/ray/prom_metrics_service_discovery.json, {folder}/extra.json"
    config = folder / "prometheus.yml"
    config.write_text(_PROMETHEUS.format(scrape=SCRAPE_S, rules=rules, targets=targets))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"),
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("wb") as out, _running(command, out, {}):
        found = Prometheus(address)
        yield _when(lambda: found if found.ready() else None)


@contextmanager
def _running(
    command: list[str], out: Any, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all below it, gone at the end."""
    process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
    try:
        yield process
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in below:
            with suppress(psutil.NoSuchProcess):  # gone meanwhile
                one.kill()
        process.wait()
        psutil.wait_procs(below, timeout=10)


def _when(found: Any) -> Any:
    deadline = time.monotonic() + _START_S
    while not (value := found()):
        assert time.monotonic() < deadline, "did not start"
        time.sleep(0.2)
    return value


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
