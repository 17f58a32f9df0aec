"""The Serve application: gateways in front of replicas. `quire.cluster.app:build` in a Serve config file."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from quire.cluster.autoscaling_policy import serve_options
from quire.cluster.config import ReplicaConfig, ServeConfig, parse
from quire.cluster.gateway.deployment import Gateway
from quire.cluster.metrics.publish import publish_replica
from quire.replicas.config import EngineConfig
from quire.replicas.deployment import Replica

_SLACK = 64
"""Requests a replica may take beyond its engine's bounds, so that the engine and not Serve says no."""

ROUTER = "quire.cluster.routing.serve_router:FirstTokenRouter"


def build(args: dict[str, Any]) -> Application:
    """The application for a configuration tree (`ServeConfig` as plain dicts). Raises ConfigError."""
    return application(parse(args))


def application(config: ServeConfig, router: str = ROUTER) -> Application:
    """Asks the connected Ray cluster, if any, whether it has GPUs. `router`: the class that chooses."""
    secret = config.secret or secrets.token_hex(32)
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    gpus = gpus_per_shard(config, cluster.get("GPU", 0))
    engine = config.engine
    if config.most_replicas == 1:  # nobody to share with
        engine = replace(engine, store=replace(engine.store, share=False))
    bound = (engine, secret, config.replicas.cpus_per_shard, gpus, publish_replica)
    options = _replica_options(engine, config.replicas, gpus)
    routed: Any = RequestRouterConfig  # its signature is wrong about its values
    options["request_router_config"] = routed(request_router_class=router)
    replica = serve.deployment(name="Replica", **_how_many(config.replicas), **options)(Replica).bind(*bound)
    prefill = None
    if config.prefill.count:
        prefill = serve.deployment(name="Prefill", num_replicas=config.prefill.count, **options)(
            Replica
        ).bind(*bound)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=1,
        ray_actor_options={"num_cpus": config.gateway.cpus, "resources": config.gateway.resources},
        graceful_shutdown_timeout_s=config.replicas.graceful_shutdown_s,
    )(Gateway)
    return gateway.bind(replica, config.gateway, config.engine.model, secret, prefill, config.prefill)


def gpus_per_shard(config: ServeConfig, cluster_gpus: float) -> float:
    """What is configured, else one where there are any and the engine may use them."""
    if config.replicas.gpus_per_shard is not None:
        return config.replicas.gpus_per_shard
    return 1.0 if cluster_gpus and config.engine.device != "cpu" else 0.0


def _how_many(replicas: ReplicaConfig) -> dict[str, Any]:
    if replicas.autoscaling is None:
        return {"num_replicas": replicas.count}
    return {"autoscaling_config": serve_options(replicas.autoscaling)}


def _replica_options(engine: EngineConfig, replicas: ReplicaConfig, gpus: float) -> dict[str, Any]:
    shard = {"CPU": replicas.cpus_per_shard} | ({"GPU": gpus} if gpus else {})
    return {
        "max_ongoing_requests": engine.scheduler.max_running + engine.scheduler.max_queued + _SLACK,
        "ray_actor_options": {"num_cpus": replicas.cpus_per_shard, "num_gpus": gpus},
        "placement_group_bundles": [shard] * engine.tp,
        "placement_group_strategy": replicas.placement,
        "health_check_period_s": replicas.health_check_period_s,
        "health_check_timeout_s": replicas.health_check_timeout_s,
        "graceful_shutdown_timeout_s": replicas.graceful_shutdown_s,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
