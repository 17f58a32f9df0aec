"""Bringing the application up and down on a connected cluster, and what went wrong if it does not start."""

from __future__ import annotations

import json
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
_ERRORS = {name: error for name, error in vars(errors).items() if isinstance(error, type)}
_SCALER_KEY = b"__autoscaling_status"
"""Where Ray's monitor says what kinds of nodes it knows."""


@contextmanager
def served(config: ServeConfig, on_progress: Callable[[str], None]) -> Iterator[int]:
    """The application on the connected cluster, taken down at the end; gives the gateway's port.

    `on_progress` is told in a few words what is going on. Raises QuireError if the application cannot start.
    """
    try:
        yield rolled_out(config, APP, on_progress).port.remote().result()
    finally:
        serve.delete(APP)
        end_directory(APP)


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
    while True:
        app = serve.status().applications[name]
        if app.status is ApplicationStatus.RUNNING:
            return
        failed = app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
        messages = [message for message in _messages(name) if failed or message not in before]
        _raise_failure("\n".join(messages), failed)
        on_progress(_missing(asked) or _progress(messages))
        time.sleep(_POLL_S)


def _progress(messages: Sequence[str]) -> str:
    waits = [message for message in messages if "to initialize" not in message]  # of that we know more
    if waits:
        return waits[0].strip().splitlines()[0].partition(". ")[0]
    match loading_progress():
        case None:
            return "starting processes"
        case (done, total) if done < total:
            return f"loading weights: {done}/{total} tensors"
        case _:
            return "preparing the first step"  # on a GPU it is compiled and captured


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
    """Whether nodes may be added. Without an autoscaler every node is the only one of its kind."""
    status = json.loads(_internal_kv_get(_SCALER_KEY) or b"{}")
    kinds = (status.get("autoscaler_report") or {}).get("active_nodes")
    return not (kinds and all(kind.removeprefix("node_") in nodes for kind in kinds))


def _raise_failure(messages: str, failed: bool) -> None:
    """Finds our own error in what Serve says of a constructor that raised.

    Whatever it is, but for a process that died, no retry mends it.
    """
    named = rf"(?:{errors.__name__}|{FormatError.__module__})\.(\w+): (.+)"
    for name, text in re.findall(named, messages):
        error = _ERRORS.get(name, QuireError)
        if failed or error is not ReplicaDied:
            raise error(text)
    if failed:
        last = messages.strip().rpartition("\n")[2].strip()
        raise QuireError(f"the application did not start: {last}. `serve status` has all of it")
