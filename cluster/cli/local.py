"""Bringing the application up and down: Ray, Serve, the wait until it answers, and what went wrong if not."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from quire.cluster.app import application, gpus_per_shard
from quire.cluster.cli.room import Group, groups, lack
from quire.cluster.config import ServeConfig
from quire.kernels.formats import FormatError
from quire.kvstore.peers.directory_actor import end_directory
from quire.replicas import errors
from quire.replicas.deployment import loading_progress
from quire.replicas.errors import ConfigError, QuireError, ReplicaDied

APP = "quire"
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 100 << 20  # nothing large travels through Ray
_ERRORS = {name: error for name, error in vars(errors).items() if isinstance(error, type)}
_SCALER_KEY = b"__autoscaling_status"
"""Where Ray's monitor says what kinds of nodes it knows."""


@contextmanager
def cluster(config: ServeConfig, address: str | None) -> Iterator[None]:
    """Connected to the Ray cluster at `address`; None: one of our own on this machine, gone at the end."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if address is None:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, _cpus(config)),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    else:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(proxy_location="Disabled")
        yield
    finally:
        ray.shutdown()


@contextmanager
def connected(address: str) -> Iterator[None]:
    """To look at a running Ray cluster. Raises QuireError if there is none at the address."""
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise QuireError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def served(config: ServeConfig, on_progress: Callable[[str], None]) -> Iterator[int]:
    """The application on the connected cluster, taken down at the end; gives the gateway's port.

    `on_progress` hears in a few words what is going on. Raises QuireError if the application cannot start.
    """
    try:
        yield rolled_out(config, APP, on_progress).port.remote().result()
    finally:
        serve.delete(APP)
        end_directory(APP)


def _cpus(config: ServeConfig) -> int:
    shards = config.most_replicas * config.engine.tp
    return round(config.gateway.count * config.gateway.cpus + shards * config.replicas.cpus_per_shard + 0.5)


def rolled_out(config: ServeConfig, app: str, on_progress: Callable[[str], None]) -> DeploymentHandle[Any]:
    """The application as configured, once all of it runs; of what ran before, the unchanged parts go on.

    Raises QuireError if something new does not start: then what it was to replace goes on.
    """
    asked = groups(config, gpus_per_shard(config, ray.cluster_resources().get("GPU", 0)))
    _missing(asked)
    before = _messages(app)
    (handle,) = serve.run_many(
        [serve.RunTarget(application(config), name=app, route_prefix=None)],
        wait_for_applications_running=False,
    )
    _await_running(app, asked, before, on_progress)
    return handle


def _messages(name: str) -> list[str]:
    """What Serve says of the application and its deployments."""
    app = serve.status().applications.get(name)
    deployments = app.deployments.values() if app else ()
    return [said for said in (app.message if app else "", *(d.message for d in deployments)) if said]


def _await_running(
    name: str, asked: Sequence[Group], before: Sequence[str], on_progress: Callable[[str], None]
) -> None:
    """`before`: messages from before the deployment, which Serve may still show."""
    said = ""
    while True:
        app = serve.status().applications[name]
        if app.status is ApplicationStatus.RUNNING:
            return
        failed = app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
        messages = [message for message in _messages(name) if failed or message not in before]
        _raise_failure("\n".join(messages), failed)
        words = _missing(asked) or _progress(messages)
        if words != said:
            on_progress(said := words)
        time.sleep(_POLL_S)


def _progress(messages: Sequence[str]) -> str:
    if messages:  # Serve's own, on what takes long
        return messages[0].strip().splitlines()[0]
    progress = loading_progress()
    return f"loading weights: {progress[0]}/{progress[1]} tensors" if progress else "starting processes"


def _missing(asked: Sequence[Group]) -> str:
    """What the cluster waits for if it may grow, else empty. Raises ConfigError if it can never hold all."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    reason = lack(asked, [node["Resources"] for node in nodes])
    if reason is None:
        return ""
    if not _may_grow({node["NodeID"] for node in nodes}):
        raise ConfigError(reason)
    return f"waiting for nodes: {reason}"


def _may_grow(nodes: Set[str]) -> bool:
    """Whether somebody may add nodes. Without an autoscaler every node is the only one of its kind."""
    status = json.loads(_internal_kv_get(_SCALER_KEY) or b"{}")
    kinds = (status.get("autoscaler_report") or {}).get("active_nodes")
    return not (kinds and all(kind.removeprefix("node_") in nodes for kind in kinds))


def _raise_failure(messages: str, failed: bool) -> None:
    """Finds our own error in what Serve says of a constructor that raised.

    Whatever it is, but for a process that died, no second try mends it.
    """
    named = rf"(?:{errors.__name__}|{FormatError.__module__})\.(\w+): (.+)"
    for name, text in re.findall(named, messages):
        error = _ERRORS.get(name, QuireError)
        if failed or error is not ReplicaDied:
            raise error(text)
    if failed:
        last = messages.strip().rpartition("\n")[2].strip()
        raise QuireError(f"the application did not start: {last}. `serve status` has all of it")
