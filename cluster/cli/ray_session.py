"""Connecting to Ray: a cluster of our own on this machine, or one that runs. In words if it does not work."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve

from quire.cluster.cli.room import own_cpus
from quire.cluster.config import ServeConfig
from quire.replicas.errors import QuireError

_OBJECT_STORE_BYTES = 100 << 20  # nothing large travels through Ray
_PROBE_S = 10.0
_CHATTER = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+ [DIW] ")
"""How lines of Ray's native code begin that are no errors."""


@contextmanager
def cluster(config: ServeConfig, address: str | None, metrics_port: int = 0) -> Iterator[None]:
    """Connected to the Ray cluster at `address`, with Serve on it.

    None: one of our own on this machine, gone at the end, which shows its metrics at `metrics_port` (0: any
    free one). Raises QuireError if Ray cannot be started or reached.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if address is None:
        _connect(
            address="local",
            num_cpus=own_cpus(config),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _metrics_export_port=metrics_port or None,
        )
    else:
        _connect(address=address)
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        ray.shutdown()


@contextmanager
def connected(address: str) -> Iterator[None]:
    """To look at a running Ray cluster. Raises QuireError if there is none at the address."""
    _connect(address=address)
    try:
        yield
    finally:
        ray.shutdown()


def metrics_address() -> str:
    """Where Prometheus gets this machine's metrics from the connected cluster."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def _connect(address: str, **options: Any) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    _probe(address)
    try:
        with native_errors_only():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "AuthenticationError" in f"{error!r} {error.__cause__!r}":
            said = (
                f"the Ray cluster at {address!r} asks for a token: set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN_PATH to the file that holds it"
            )
        elif address == "local":
            said = f"Ray did not start: {said}; its logs are in /tmp/ray/session_latest/logs"
        else:
            said = f"no Ray cluster answers at {address!r}: {said}"
        raise QuireError(said) from error


def _probe(address: str) -> None:
    """Raises QuireError where nothing listens; Ray alone would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), _PROBE_S).close()
        except OSError as error:
            raise QuireError(f"no Ray cluster answers at {address!r}: {error.strerror or error}") from error


@contextmanager
def native_errors_only() -> Iterator[None]:
    """Of what native code writes to standard error meanwhile, errors come through afterwards."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if not _CHATTER.match(line):
                    print(line, file=sys.stderr)
