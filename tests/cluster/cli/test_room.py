"""What a cluster can never hold is said in the configuration's words; what it may hold is not doubted."""

import pytest

from quire.cluster.cli.room import groups, lack
from quire.cluster.config import parse


def asked(gpus=0.0, **tree):
    config = parse({"engine": {"model": "demo", **tree.pop("engine", {})}, **tree})
    return groups(config, gpus)


def nodes(*cpus, **others):
    return [{"CPU": float(count), **others} for count in cpus]


@pytest.mark.parametrize(
    ("wanted", "there", "says"),
    [
        pytest.param(
            asked(replicas={"count": 3}),
            nodes(2),
            "3 replicas with 1 CPU each: there is room for 2; the cluster has 1 node with 2 CPU and 0 GPU. "
            "Change replicas.count",
            id="too many replicas",
        ),
        pytest.param(
            asked(gpus=1.0),
            nodes(8, 4),
            "1 CPU and 1 GPU: no node has that; the cluster has 2 nodes with 4 CPU and 0 GPU or 8",
            id="no GPU",
        ),
        pytest.param(
            asked(gpus=1.0, engine={"tp": 2}),
            [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0}],
            "1 replica (2 shards each) with 1 CPU and 1 GPU a shard: there is room for 0",
            id="one GPU too few",
        ),
        pytest.param(
            asked(engine={"tp": 3}, replicas={"placement": "STRICT_PACK"}),
            nodes(2, 2, 2),
            "no node has room for all shards of one, as STRICT_PACK wants",
            id="no node has room for a whole replica",
        ),
        pytest.param(
            asked(engine={"tp": 2}, replicas={"placement": "STRICT_SPREAD"}),
            nodes(16),
            "2 nodes with room are needed, no two on one, and there is room on 1",
            id="no second node",
        ),
        pytest.param(asked(gateway={"count": 2}), nodes(16), "2 gateways", id="gateways share no port"),
        pytest.param(
            asked(gateway={"resources": {"head": 0.1}}),
            nodes(16),
            "1 CPU and 0.1 head: no node has",
            id="resource",
        ),
        pytest.param(
            asked(replicas={"count": 2}),
            nodes(2),
            "2 replicas with 1 CPU each and 1 gateway with 1 CPU: that is 3 CPU; the cluster has 1 node",
            id="nothing left for the gateway",
        ),
        pytest.param(
            asked(replicas={"autoscaling": {"min": 0, "max": 4}, "cpus_per_shard": 5.0}),
            nodes(4),
            "1 replica with 5 CPU: no node has that",
            id="none to begin with, but the first would never come",
        ),
        pytest.param(asked(), [], "the cluster has 0 nodes", id="no node"),
    ],
)
def test_what_can_never_be_held_is_told(wanted, there, says):
    reason = lack(wanted, there)
    assert reason is not None
    assert says in reason
    assert reason.endswith("or add nodes")


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        (asked(), nodes(2)),
        (asked(engine={"tp": 4}, replicas={"cpus_per_shard": 0.1}, gateway={"cpus": 0.1}), nodes(0.5)),
        (asked(replicas={"cpus_per_shard": 0.0}, gateway={"cpus": 0.0}), nodes(0)),
        (asked(engine={"tp": 2}, replicas={"placement": "STRICT_SPREAD"}), nodes(2, 2)),
        (asked(gateway={"count": 3, "port": 0}), nodes(4)),
        (asked(replicas={"autoscaling": {"min": 1, "max": 100}}), nodes(2)),
        (asked(gpus=0.5, engine={"tp": 2}), [{"CPU": 3.0, "GPU": 1.0}]),
    ],
)
def test_what_may_be_held_is_not_doubted(wanted, there):
    assert lack(wanted, there) is None
