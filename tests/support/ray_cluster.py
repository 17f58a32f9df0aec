"""One Ray cluster for all tests that can share it, and applications of their own on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import psutil
from observability.generate import ROOT
from ray import serve
from served_app import Served, config_tree, free_port

from quire.cluster.cli.ray_session import cluster
from quire.cluster.cli.rollout import rolled_out
from quire.cluster.config import parse
from quire.kvstore.peers.directory_actor import end_directory

START_S = 180.0
Process: TypeAlias = "subprocess.Popen[bytes]"


class Cluster:
    """Processes of a Ray cluster on this machine."""

    def __init__(self, process: Process, folder: Path, address: str) -> None:
        """`folder`: its files are below. `address`: for Ray, whose token `tests/conftest.py` has set."""
        self.process, self.folder, self.address = process, folder, address

    @contextmanager
    def joined(self) -> Iterator[None]:
        """This process may use Ray and Serve there until the context ends."""
        with cluster(parse(config_tree()), self.address):
            yield

    @contextmanager
    def application(self, name: str, **changes: dict[str, object]) -> Iterator[Served]:
        """The configuration of tests with `changes` by branch, served on the joined cluster under a name."""
        try:
            handle = rolled_out(parse(config_tree(**changes)), name, lambda words: None)
            yield Served(self.process, f"127.0.0.1:{handle.port.remote().result()}", name)
        finally:
            serve.delete(name)
            end_directory(name)


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A head node that measures itself every second and asks for these tests' token, gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="qr", dir="/tmp"))  # Ray's sockets need a short path
    address = f"127.0.0.1:{free_port()}"
    command = [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", "--num-cpus=4", "--object-store-memory=100000000"),
        *("--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"),
        *(f"--dashboard-port={free_port()}", f"--temp-dir={folder / 'ray'}"),
    ]
    shown = folder / "dashboards"
    shutil.copytree(ROOT / "deploy/grafana", shown)
    of_head = {
        "RAY_metrics_report_interval_ms": "1000",
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(shown),
    }
    log = folder / "ray.log"
    try:
        with log.open("wb") as out, running(command, out, of_head) as process:
            until(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None, START_S)
            assert process.poll() is None, f"ray start failed: {log.read_text()}"
            yield Cluster(process, folder, address)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running(command: list[str], out: Any, environment: Mapping[str, str]) -> Iterator[Process]:
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


def until(condition: Any, within_s: float) -> Any:
    """The first true value of a condition. Raises AssertionError after `within_s`."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        time.sleep(0.05)
    return value
