"""Whether a cluster's nodes can hold what a configuration asks for, and the words for it if not. Pure.

Only what can never be is told: all placements must keep every rule here, whatever else runs there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quire.cluster.config import ServeConfig

Resources = Mapping[str, float]

_EPSILON = 1e-6
"""Ray counts in ten-thousandths; so small a lack is a sum of fractions."""


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that start and end together: the shards of a replica, or one gateway."""

    name: str
    shape: Resources
    """What Ray reserves for one process."""
    size: int
    """Processes of one group."""
    count: int
    """Groups that there must be at least."""
    keys: str
    """Of the configuration: what to change."""
    on_one_node: bool = False
    """All processes of one group."""
    on_own_nodes: int = 0
    """This many processes may not share a node."""


def groups(config: ServeConfig, gpus_per_shard: float) -> tuple[Group, ...]:
    """What must run for the application to be up."""
    replicas, gateway, tp = config.replicas, config.gateway, config.engine.tp
    least = max(replicas.autoscaling.min, 1) if replicas.autoscaling else replicas.count
    shard = {"CPU": replicas.cpus_per_shard, "GPU": gpus_per_shard}
    return (
        Group(
            name="replica",
            shape={name: amount for name, amount in shard.items() if amount},
            size=tp,
            count=least + config.prefill.count,
            keys="replicas.count, cpus_per_shard, gpus_per_shard or placement, or engine.tp",
            on_one_node=replicas.placement == "STRICT_PACK",
            on_own_nodes=tp if replicas.placement == "STRICT_SPREAD" else 0,
        ),
        Group(
            name="gateway",
            shape={"CPU": gateway.cpus, **gateway.resources},
            size=1,
            count=gateway.count,
            keys="gateway.count, cpus or resources",
            on_own_nodes=gateway.count if gateway.port else 0,
        ),
    )


def own_cpus(config: ServeConfig) -> int:
    """CPUs that Ray is told this machine has: never fewer than the processes reserve."""
    shards = config.most_replicas * config.engine.tp
    reserved = config.gateway.count * config.gateway.cpus + shards * config.replicas.cpus_per_shard
    return max(os.cpu_count() or 1, round(reserved + 0.5))


def lack(asked: Sequence[Group], nodes: Sequence[Resources]) -> str | None:
    """Why these nodes can never hold all that is asked; None where they may."""
    for group in asked:
        if reason := _lack_of(group, nodes):
            return f"{_words(group)}: {reason}; {_what_to_do(group, nodes)}"
    for name in sorted({name for group in asked for name in group.shape}):
        need = sum(group.shape.get(name, 0) * group.size * group.count for group in asked)
        have = sum(node.get(name, 0) for node in nodes)
        if need > have + _EPSILON:
            together = " and ".join(map(_words, asked))
            return f"{together}: that is {need:g} {name}; {_what_to_do(asked[0], nodes)}"
    return None


def _lack_of(group: Group, nodes: Sequence[Resources]) -> str | None:
    held = [_holds(node, group.shape) for node in nodes]
    good = sum(map(bool, held))
    if not good:
        return "no node has that"
    if group.on_one_node and max(held) < group.size:
        return "no node has room for all shards of one, as STRICT_PACK wants"
    if good < group.on_own_nodes:
        return f"{group.on_own_nodes} nodes with room are needed, no two on one, and there is room on {good}"
    room = sum(n // group.size for n in held) if group.on_one_node else sum(held) // group.size
    return f"there is room for {room:g}" if room < group.count else None


def _holds(node: Resources, shape: Resources) -> float:
    """Processes of this shape that fit on an empty node."""
    fits = [(node.get(name, 0) + _EPSILON) / amount for name, amount in shape.items() if amount]
    return min(map(math.floor, fits), default=math.inf)


def _words(group: Group) -> str:
    each = f" ({group.size} shards each)" if group.size > 1 else ""
    asked = " and ".join(f"{amount:g} {name}" for name, amount in group.shape.items()) or "nothing"
    one = " a shard" if group.size > 1 else " each" if group.count > 1 else ""
    return f"{group.count} {group.name}{'s' if group.count > 1 else ''}{each} with {asked}{one}"


def _what_to_do(group: Group, nodes: Sequence[Resources]) -> str:
    kinds = {f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes}
    has = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} with {' or '.join(sorted(kinds))}"
    return f"the cluster has {has}. Change {group.keys}, or add nodes"
