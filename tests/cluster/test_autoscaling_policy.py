"""What the policy takes from Serve's controller; that Serve acts on it is `test_scaled.py`'s."""

from dataclasses import asdict

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingContext

from quire.cluster.autoscaling_policy import observed
from quire.replicas.engine.pressure import Pressure

REPLICAS = [ReplicaID(unique_id=name, deployment_id=DeploymentID(name="Replica")) for name in "ab"]
FULL = Pressure(occupancy=0.9, prefill_queue_s=0.5, prefill_use=0.4, first_token_s=3.0)


def context(reported: dict[ReplicaID, Pressure]) -> AutoscalingContext:
    figures: dict[str, dict[ReplicaID, float]] = {}
    for replica, pressure in reported.items():
        for name, value in asdict(pressure).items():
            figures.setdefault(name, {})[replica] = value
    return AutoscalingContext(
        deployment_id=REPLICAS[0].deployment_id,
        deployment_name="Replica",
        app_name="quire",
        current_num_replicas=2,
        target_num_replicas=3,
        running_replicas=REPLICAS,
        total_num_requests=lambda: 9.0,
        total_queued_requests=lambda: 4.0,
        aggregated_metrics=lambda: figures,
        raw_metrics=None,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=None,
    )


def test_every_figure_of_every_replica_arrives():
    idle = Pressure()
    seen = observed(context({REPLICAS[0]: FULL, REPLICAS[1]: idle}))
    assert (seen.running, seen.target, seen.waiting) == (2, 3, 4.0)
    assert seen.pressures == (FULL, idle)


def test_a_replica_that_has_not_reported_is_left_out():
    assert observed(context({REPLICAS[1]: FULL})).pressures == (FULL,)
    assert observed(context({})).pressures == ()


def test_a_replica_that_is_going_is_left_out():
    gone = ReplicaID(unique_id="c", deployment_id=REPLICAS[0].deployment_id)
    assert observed(context({REPLICAS[0]: FULL, gone: FULL})).pressures == (FULL,)
