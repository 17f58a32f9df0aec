"""The Serve application: gateways in front of replicas. `quire.cluster.app:build` in a Serve config file."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace
from importlib import metadata
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve import Application

from quire.cluster.autoscaling_policy import serve_options
from quire.cluster.config import GatewayConfig, ReplicaConfig, ServeConfig, parse
from quire.cluster.gateway.deployment import Gateway
from quire.cluster.metrics.publish import publish_replica
from quire.replicas.config import EngineConfig
from quire.replicas.deployment import Replica

_SECRET_KEY = b"quire/secret"


def build(args: dict[str, Any]) -> Application:
    """The application for a configuration tree (`ServeConfig` as plain dicts). Raises ConfigError."""
    return application(parse(args))


def application(config: ServeConfig, gateway: type[Gateway] = Gateway, **options: Any) -> Application:
    """Make the application, for the connected Ray cluster if there is one: it may have GPUs.

    `gateway` and `options`, of the replicas' deployment, are for benchmarks that choose replicas otherwise.
    """
    secret = config.secret or _kept_secret()
    cluster = ray.cluster_resources() if ray.is_initialized() else {}
    gpus = gpus_per_shard(config, cluster.get("GPU", 0))
    engine = config.engine
    if config.most_replicas == 1:  # no peer to share with
        engine = replace(engine, store=replace(engine.store, share=False))
    made_of = (engine, secret, config.replicas.cpus_per_shard, gpus)
    bound = (*made_of, publish_replica)
    options = _replica_options(engine, config.replicas, gpus) | options
    replicas = _versioned(serve.deployment(Replica, **options), *made_of)
    replica = replicas.options(name="Replica", **_how_many(config.replicas)).bind(*bound)
    prefill = None
    if config.prefill.count:
        prefill = replicas.options(name="Prefill", num_replicas=config.prefill.count).bind(*bound)
    drain_s = config.replicas.graceful_shutdown_s
    front = replace(config.gateway, count=1)  # how many there are is nothing to one of them
    split = replace(config.prefill, count=min(config.prefill.count, 1))
    gateways = serve.deployment(gateway, **_gateway_options(config.gateway, drain_s))
    gateways = _versioned(gateways, front, secret, split, drain_s)
    app: Application = gateways.bind(replica, front, secret, prefill, split, drain_s)
    return app


def _versioned(deployment: Any, *made_of: object) -> Any:
    """Serve replaces its processes when any of this changes or Quire itself does, and else leaves them be.

    `serve.run` alone would take every deployment for a new version.
    """
    text = f"{metadata.version('quire')} {made_of!r}"
    version = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return deployment.options(version=version, _internal=True)


def _kept_secret() -> str:
    """The connected cluster's own, made for its first application: a new one would replace everything."""
    if not ray.is_initialized():
        return secrets.token_hex(32)
    _internal_kv_put(_SECRET_KEY, secrets.token_hex(32).encode(), overwrite=False)
    kept: bytes = _internal_kv_get(_SECRET_KEY)
    return kept.decode()


def gpus_per_shard(config: ServeConfig, cluster_gpus: float) -> float:
    """What is configured, else one where there are any and the engine may use them."""
    if config.replicas.gpus_per_shard is not None:
        return config.replicas.gpus_per_shard
    return 1.0 if cluster_gpus and config.engine.device != "cpu" else 0.0


def _how_many(replicas: ReplicaConfig) -> dict[str, Any]:
    if replicas.autoscaling is None:
        return {"num_replicas": replicas.count}
    return {"autoscaling_config": serve_options(replicas.autoscaling)}


def _gateway_options(gateway: GatewayConfig, drain_s: float) -> dict[str, Any]:
    """A new one may share its port with the one it replaces, but several must not share a node's."""
    spread = gateway.port != 0 and gateway.count > 1
    return {
        "name": "Gateway",
        "num_replicas": gateway.count,
        "ray_actor_options": {"num_cpus": gateway.cpus, "resources": gateway.resources},
        "max_replicas_per_node": 1 if spread else None,
        "max_surge_percent": 0 if spread else 100,
        "graceful_shutdown_timeout_s": drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
    }


def _replica_options(engine: EngineConfig, replicas: ReplicaConfig, gpus: float) -> dict[str, Any]:
    shard = {"CPU": replicas.cpus_per_shard} | ({"GPU": gpus} if gpus else {})
    return {
        "ray_actor_options": {"num_cpus": replicas.cpus_per_shard, "num_gpus": gpus},
        "placement_group_bundles": [shard] * engine.tp,
        "placement_group_strategy": replicas.placement,
        "health_check_period_s": replicas.health_check_period_s,
        "health_check_timeout_s": replicas.health_check_timeout_s,
        "graceful_shutdown_timeout_s": replicas.graceful_shutdown_s,
        "rolling_update_percentage": replicas.update_percent / 100,
        "max_surge_percent": replicas.surge_percent,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
