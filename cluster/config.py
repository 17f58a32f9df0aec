"""The configuration of a served application: one frozen tree with the engine's as its largest branch.

Parsed from what a YAML file or the CLI gives; an unknown key or a value of the wrong type is refused by its
full name. deploy/serve.yaml lists every key, and a test holds the two together.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from quire.cluster.autoscaling import AutoscalingConfig
from quire.replicas.config import EngineConfig
from quire.replicas.config_types import fits, words
from quire.replicas.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Where clients connect, and how much one gateway takes on."""

    host: str = "127.0.0.1"
    """The address to listen on. The gateway asks nobody for a key: leave it on the loopback address, or put
    something that does in front."""
    port: int = 8100
    """0: any free port (`quire gateways` tells)."""
    count: int = 1
    """Gateways: one on a node at most, unless `port` is 0."""
    max_open_requests: int = 1024
    """Requests open at once; one more is refused with RESOURCE_EXHAUSTED."""
    max_message_bytes: int = 16 << 20
    """The largest message a client may send."""
    max_tokenizing_bytes: int = 64 << 20
    """Texts that may wait to be tokenized, all together; more are refused with RESOURCE_EXHAUSTED."""
    replica_wait_s: float = 60.0
    """How long a request may wait while no replica is ready; then it fails with UNAVAILABLE."""
    cpus: float = 1.0
    """CPU cores that Ray reserves for the gateway."""
    resources: dict[str, float] = field(default_factory=dict)
    """Other resources that its node must have; {"node:__internal_head__": 0.001} keeps it on the head."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"gateway.port lies in 0..65535, got {self.port}")
        if self.count < 1:
            raise ConfigError(f"gateway.count must be at least 1, got {self.count}")
        for name in ("max_open_requests", "max_message_bytes", "replica_wait_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"gateway.{name} must be positive, got {getattr(self, name)}")
        if self.max_tokenizing_bytes < self.max_message_bytes:
            raise ConfigError(
                f"gateway.max_tokenizing_bytes={self.max_tokenizing_bytes} would never take the text of a "
                f"message of gateway.max_message_bytes={self.max_message_bytes}; raise it to that or more"
            )
        for name, amount in self.resources.items():
            if isinstance(amount, bool) or not isinstance(amount, int | float) or amount <= 0:
                raise ConfigError(f"gateway.resources.{name} must be a positive number, got {amount!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """How many engines there are, what Ray reserves for each, and how Serve watches them."""

    count: int = 1
    """Replicas: whole engines, each with engine.tp shards."""
    autoscaling: AutoscalingConfig | None = None
    """In place of `count`: as many replicas as the load asks for."""
    cpus_per_shard: float = 1.0
    """CPU cores that Ray reserves for each shard."""
    gpus_per_shard: float | None = None
    """GPUs that Ray reserves for each shard; with 0 a shard sees none. None: 1 where the cluster has GPUs and
    engine.device allows them."""
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """Where the shards of one replica go: Ray's placement group strategy."""
    health_check_period_s: float = 1.0
    """A replica is replaced after three failed checks in a row."""
    health_check_timeout_s: float = 5.0
    graceful_shutdown_s: float = 20.0
    """How long a replica that is taken down may finish its requests."""
    update_percent: float = 20.0
    """An update replaces so many replicas at a time, at least one."""
    surge_percent: int = 0
    """So many more replicas may run during an update, at least one; then old ones serve until new ones are
    ready. 0: old ones stop first, for clusters without room; with one replica requests wait meanwhile."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"replicas.count must be at least 1, got {self.count}")
        if self.count > 1 and self.autoscaling is not None:
            raise ConfigError(
                f"replicas.count={self.count} fixes what replicas.autoscaling is to decide; give one of them"
            )
        for name, least in (("update_percent", 1), ("surge_percent", 0)):
            if not least <= getattr(self, name) <= 100:
                raise ConfigError(f"replicas.{name} lies in {least}..100, got {getattr(self, name)}")
        for name in ("health_check_period_s", "health_check_timeout_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"replicas.{name} must be positive, got {getattr(self, name)}")
        for name in ("cpus_per_shard", "gpus_per_shard", "graceful_shutdown_s"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"replicas.{name} must not be negative, got {getattr(self, name)}")

    @property
    def most(self) -> int:
        """Replicas that there may ever be at once."""
        return self.autoscaling.max if self.autoscaling else self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """Replicas besides the others that only compute long prompts, whose blocks the others then fetch."""

    count: int = 0
    """Prefill replicas, made like all others; 0: every replica computes its own prompts."""
    least_tokens: int = 2048
    """Shorter prompts are computed where they decode."""
    wait_s: float = 1.0
    """How long a prompt waits while no prefill replica is ready; then it is computed where it decodes."""

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"prefill.count must not be negative, got {self.count}")
        for name in ("least_tokens", "wait_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"prefill.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A served application."""

    engine: EngineConfig
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    secret: str | None = None
    """What gateways show to replicas. None: the cluster's own, made at its first deployment."""

    @property
    def most_replicas(self) -> int:
        """That there may be at once, prefill replicas included."""
        return self.replicas.most + self.prefill.count

    def __post_init__(self) -> None:
        if self.prefill.count and not self.engine.store.share:
            raise ConfigError(
                "prefill replicas hand blocks over: set engine.store.share to true, or prefill.count to 0"
            )


def parse(tree: Mapping[str, Any]) -> ServeConfig:
    """Raises ConfigError, which names the key and the keys there are."""
    return _build(ServeConfig, tree, "")


def _build(kind: type[T], tree: object, path: str) -> T:
    """A dataclass from a mapping; `path` is its place in the tree, with a dot at the end."""
    where = path.rstrip(".") or "the configuration"
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values, got {tree!r}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            raise ConfigError(f"unknown key {path}{key}; {where} has the keys {', '.join(known)}")
    hints = typing.get_type_hints(kind)
    values = {key: _value(hints[key], value, path + key) for key, value in tree.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where} lacks a key without a default: {error}") from error


def _value(hint: Any, value: object, path: str) -> object:
    branches = [option for option in (hint, *typing.get_args(hint)) if is_dataclass(option)]
    if branches and not (value is None and fits(hint, None)):
        return _build(typing.cast(type, branches[0]), value, path + ".")
    if not fits(hint, value):
        raise ConfigError(f"{path} must be {words(hint)}, got {value!r}")
    return value
