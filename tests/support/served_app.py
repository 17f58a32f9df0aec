"""`quire serve` itself, for tests: a Ray cluster, a gateway, a replica of two shards."""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

CONFIG = {
    "engine": {
        "model": "demo",
        "kv": "int8",
        "tp": 2,
        "shard_timeout_s": 3.0,
        "threads_per_shard": 1,
        "pool": {"bytes": 8 << 20},
        "scheduler": {"max_running": 16, "max_queued": 32},
    },
    "gateway": {"port": 0, "cpus": 0.1},
    "replicas": {"cpus_per_shard": 0.1, "health_check_period_s": 0.5, "graceful_shutdown_s": 1},
}


class Served:
    """A running application, and Ray's processes that belong to it."""

    def __init__(self, process: subprocess.Popen[Any], address: str, app: str = "quire") -> None:
        """`process`: the one below which its processes are."""
        self.process, self.address, self._app = process, address, app

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of a deployment (Replica, Prefill, Gateway), or of an actor's class (ShardActor)."""
        titles, found = (f"ray::ServeReplica:{self._app}:{name}", f"ray::{name}"), []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # gone meanwhile
                if any(title in " ".join(process.cmdline()) for title in titles):
                    found.append(process)
        return found


def config_tree(**changes: dict[str, object]) -> dict[str, Any]:
    """`CONFIG` with `changes` by branch."""
    return {branch: CONFIG.get(branch, {}) | changes.get(branch, {}) for branch in CONFIG | changes}


@contextmanager
def quire_serve(
    folder: Path, *, ray_address: str | None = None, **changes: dict[str, object]
) -> Iterator[Served]:
    """Up until the context ends, then gone; `folder` takes its configuration, with `changes` by branch.

    `ray_address`: of the cluster of these tests; without it, a Ray of its own, as a user has it.
    """
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_tree(**changes)))
    command = [sys.executable, "-m", "quire.cluster.cli.main", "serve", "--config", str(config)]
    environment = dict(os.environ)
    if ray_address is None:
        del environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]
    else:
        command += ["--ray-address", ray_address]
    process = subprocess.Popen(
        [*command, "--port", str(free_port())], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving demo at (\S+);", line):
                yield Served(process, found[1])
                return
        raise AssertionError("quire serve did not start:\n" + "".join(said))
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.communicate(timeout=180)
        assert process.returncode == 130
        assert not psutil.wait_procs(below, timeout=60)[1], "a process was left behind"


def free_port() -> int:
    """One that neither the system nor Ray gives to anybody before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def quire(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """One command, as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", "quire.cluster.cli.main", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **env},
    )
