"""The configuration of a served application: one frozen tree with the engine's as its largest branch.

Parsed from what a YAML file or the CLI gives; an unknown key or a value of the wrong type is refused by its
full name. deploy/serve.yaml lists every key, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from quire.cluster.autoscaling import AutoscalingConfig
from quire.replicas.config import EngineConfig
from quire.replicas.config_decoder import Count, NotNegative, Positive, decode
from quire.replicas.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Where clients connect, and how much one gateway takes on."""

    host: str = "127.0.0.1"
    """The address to listen on. The gateway does not ask for a key: leave it on the loopback address, or put
    something that does in front."""
    port: Annotated[int, Meta(ge=0, le=65535)] = 8100
    """0: any free port (`quire gateways` tells)."""
    count: Count = 1
    """Gateways: one on a node at most, unless `port` is 0."""
    max_open_requests: Count = 1024
    """Requests open at once; one more is refused with RESOURCE_EXHAUSTED."""
    max_message_bytes: Count = 16 << 20
    """The largest message a client may send."""
    max_tokenizing_bytes: Count = 64 << 20
    """Texts that may wait to be tokenized, all together; more are refused with RESOURCE_EXHAUSTED."""
    replica_wait_s: Positive = 60.0
    """How long a request may wait while no replica is ready; then it fails with UNAVAILABLE."""
    cpus: float = 1.0
    """CPU cores that Ray reserves for the gateway."""
    resources: dict[str, Positive] = field(default_factory=dict)
    """Other resources that its node must have; {"node:__internal_head__": 0.001} keeps it on the head."""

    def __post_init__(self) -> None:
        if self.max_tokenizing_bytes < self.max_message_bytes:
            raise ConfigError(
                f"gateway.max_tokenizing_bytes={self.max_tokenizing_bytes} would never take the text of a "
                f"message of gateway.max_message_bytes={self.max_message_bytes}; raise it to that or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaConfig:
    """How many engines there are, what Ray reserves for each, and how Serve watches them."""

    count: Count = 1
    """Replicas: whole engines, each with engine.tp shards."""
    autoscaling: AutoscalingConfig | None = None
    """In place of `count`: as many replicas as the load asks for."""
    cpus_per_shard: NotNegative = 1.0
    """CPU cores that Ray reserves for each shard."""
    gpus_per_shard: NotNegative | None = None
    """GPUs that Ray reserves for each shard; with 0 a shard sees none. None: 1 where the cluster has GPUs and
    engine.device allows them."""
    placement: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = "PACK"
    """Where the shards of one replica go: Ray's placement group strategy."""
    health_check_period_s: Positive = 1.0
    """A replica is replaced after three failed checks in a row."""
    health_check_timeout_s: Positive = 5.0
    graceful_shutdown_s: NotNegative = 20.0
    """How long a replica that is taken down may finish its requests."""
    update_percent: Annotated[float, Meta(ge=1, le=100)] = 20.0
    """Share of the replicas that an update replaces at a time, at least one."""
    surge_percent: Annotated[int, Meta(ge=0, le=100)] = 0
    """How many more replicas may run during an update, at least one; then old ones serve until new ones are
    ready. 0: old ones stop first, for clusters without room; with one replica requests wait meanwhile."""

    def __post_init__(self) -> None:
        if self.count > 1 and self.autoscaling is not None:
            raise ConfigError(
                f"replicas.count={self.count} fixes what replicas.autoscaling is to decide; give one of them"
            )

    @property
    def most(self) -> int:
        """The largest number of replicas at once."""
        return self.autoscaling.max if self.autoscaling else self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """Replicas besides the others that only compute long prompts, whose blocks the others then fetch."""

    count: Annotated[int, Meta(ge=0)] = 0
    """Prefill replicas, made like all others; 0: every replica computes its own prompts."""
    least_tokens: Count = 2048
    """Shorter prompts are computed where they decode."""
    wait_s: Positive = 1.0
    """How long a prompt waits while no prefill replica is ready; then it is computed where it decodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """A served application."""

    engine: EngineConfig
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    replicas: ReplicaConfig = field(default_factory=ReplicaConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    secret: str | None = None
    """What gateways authenticate with at replicas. None: the cluster's own, made at its first deployment."""

    @property
    def most_replicas(self) -> int:
        """The largest number of replicas at once, prefill replicas included."""
        return self.replicas.most + self.prefill.count

    def __post_init__(self) -> None:
        if self.prefill.count and not self.engine.store.share:
            raise ConfigError(
                "prefill replicas hand blocks over: set engine.store.share to true, or prefill.count to 0"
            )


def parse(tree: Mapping[str, Any]) -> ServeConfig:
    """The configuration of a tree. Raises ConfigError, which names the key and what it takes."""
    return decode(ServeConfig, tree)
