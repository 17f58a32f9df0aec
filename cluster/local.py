"""Bringing the application up and down: Ray, Serve, the wait until it answers, and what went wrong if not."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from quire.cluster.app import application
from quire.cluster.config import ServeConfig
from quire.kvstore.directory_actor import end_directory
from quire.replicas.deployment import loading_progress
from quire.replicas.errors import ConfigError, ModelNotServable, QuireError, UnknownModel

APP = "quire"
_POLL_S = 0.2
_OBJECT_STORE_BYTES = 100 << 20  # nothing large travels through Ray
_PERMANENT = {error.__name__: error for error in (ConfigError, ModelNotServable, UnknownModel)}
"""What no second try mends."""


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
    (handle,) = serve.run_many(
        [serve.RunTarget(application(config), name=app, route_prefix=None)],
        wait_for_applications_running=False,
    )
    _await_running(app, on_progress)
    return handle


def _await_running(name: str, on_progress: Callable[[str], None]) -> None:
    said = ""
    while True:
        app = serve.status().applications[name]
        if app.status is ApplicationStatus.RUNNING:
            return
        messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
        failed = app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
        _raise_failure("\n".join(messages), failed)
        progress = loading_progress()
        words = f"loading weights: {progress[0]}/{progress[1]} tensors" if progress else "starting processes"
        if words != said:
            on_progress(said := words)
        time.sleep(_POLL_S)


def _raise_failure(messages: str, failed: bool) -> None:
    """Finds our own error in what Serve says of a constructor that raised."""
    for name, text in re.findall(r"quire\.replicas\.errors\.(\w+): (.+)", messages):
        if name in _PERMANENT:
            raise _PERMANENT[name](text)
        if failed:
            raise QuireError(f"{name}: {text}")
    if failed:
        raise QuireError(f"the application did not start: {messages.strip()}")
