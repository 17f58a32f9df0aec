"""Autoscaling inside Ray Serve: the controller calls the policy, which decides and records why."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from quire.cluster.autoscaling import AutoscalingConfig, Decision, Observed, decide
from quire.replicas.engine.pressure import Pressure

_LOG = "ray.serve"  # the controller's own log
_RECORD_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class ScalingRecord:
    """The last decision of autoscaling, for users and metrics."""

    target: int
    """The number of replicas that Serve aims at."""
    wanted: int
    """The number that loads require now, which becomes the target after the delay."""
    reasons: tuple[str, ...]
    """The reasons for `wanted`."""
    at_s: float
    """Time of the decision, by the wall clock."""


class Policy:
    """The policy, which Serve's controller calls ten times a second. Arguments are `AutoscalingConfig`'s."""

    def __init__(self, **config: Any) -> None:
        self._config = AutoscalingConfig(**config)
        self._target: int | None = None
        self._change = Decision(0, ())
        self._recorded_s = 0.0

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        target, now_s = context.target_num_replicas, time.time()
        if self._target is not None and target != self._target:
            reasons = self._change.reasons if self._target else ("a request came while none ran",)
            logging.getLogger(_LOG).info(
                "quire: %d → %d replicas: %s", self._target, target, "; ".join(reasons[:2])
            )
        decision = decide(observed(context), self._config)
        if decision.replicas != target:
            self._change = decision
        if target != self._target or now_s >= self._recorded_s + _RECORD_PERIOD_S:
            self._recorded_s = now_s
            record = ScalingRecord(target, decision.replicas, decision.reasons, now_s)
            _internal_kv_put(
                _key(context.app_name or ""), json.dumps(asdict(record)).encode(), overwrite=True
            )
        self._target = target
        return decision.replicas, {}


def observed(context: AutoscalingContext) -> Observed:
    """Convert what Serve's controller knows of replicas and of requests that wait for them."""
    metrics = context.aggregated_metrics or {}
    names = [f.name for f in fields(Pressure)]
    return Observed(
        running=context.current_num_replicas,
        target=context.target_num_replicas,
        waiting=context.total_queued_requests or 0.0,
        pressures=tuple(
            Pressure(**{name: metrics[name][replica] for name in names})
            for replica in context.running_replicas
            if all(replica in metrics.get(name, {}) for name in names)
        ),
    )


def serve_options(config: AutoscalingConfig) -> ServeAutoscaling:
    """Return the deployment's option. A first replica starts even with min 0, so that errors show at once."""
    return ServeAutoscaling(
        min_replicas=config.min,
        max_replicas=config.max,
        initial_replicas=None if config.min else 1,
        look_back_period_s=config.look_back_s,
        metrics_interval_s=config.report_period_s,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        downscale_to_zero_delay_s=config.downscale_to_zero_delay_s,
        policy=AutoscalingPolicy(
            policy_function="quire.cluster.autoscaling_policy:Policy", policy_kwargs=asdict(config)
        ),
    )


def last_record(app: str) -> ScalingRecord | None:
    """Return the last record of an application on the connected cluster; None without autoscaling."""
    said = _internal_kv_get(_key(app))
    if said is None:
        return None
    record = json.loads(said)
    return ScalingRecord(**record | {"reasons": tuple(record["reasons"])})


def _key(app: str) -> bytes:
    return f"quire/autoscaling/{app}".encode()
