"""Alerts over the catalogue of metrics, each with what to do.

Data only; `generate.py` writes Prometheus' rules from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from observability.promql import TARGET_REPLICAS, Scope

from quire.cluster.metrics import catalogue as c
from quire.cluster.metrics.samples import ASKING

_ASKED = {"method": ASKING}


class Severity(StrEnum):
    CRITICAL = "critical"  # clients get no or wrong answers: act now
    WARNING = "warning"  # it will come to that, or costs money: act today


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Bounds that a deployment may change. Durations as Prometheus writes them."""

    window: str = "5m"
    """The window of rates."""
    hold: str = "5m"
    """How long a warning's condition lasts before it fires."""
    hold_critical: str = "1m"
    first_token_s: float = 2.0
    """The promised p90 of TTFT."""
    inter_token_s: float = 0.2
    """The promised p90 of the time between tokens."""
    bad_share: float = 0.01
    """Share of requests."""
    full_share: float = 0.9
    """Share of a limit of gateways or queues."""
    pool_share: float = 0.95
    preemptions_s: float = 0.1
    """Preemptions per second, of one application."""
    fetch_failure_share: float = 0.1
    hit_drop: float = 0.5
    """A hit rate below this part of the one before is a collapse."""
    hit_history: str = "1h"
    """The window of the hit rate for comparison, which ends `hit_gap` ago."""
    hit_gap: str = "10m"
    hit_tokens_s: float = 10.0
    """The least prompt tokens per second for a meaningful hit rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    name: str
    severity: Severity
    expression: str
    hold: str
    summary: str
    """One line; Prometheus replaces `{{ $value }}` and `{{ $labels.x }}`."""
    action: str
    """What to look at and do."""


def alerts(tuning: Tuning | None = None) -> tuple[Alert, ...]:
    """Return all alerts, the most severe first."""
    t = tuning or Tuning()
    scope = Scope(window=t.window, by="application")
    return (*_service(t, scope), *_latency(t, scope), *_capacity(t, scope), *_store(t, scope))


def _service(t: Tuning, s: Scope) -> tuple[Alert, ...]:
    each = replace(s, by="application, replica")
    failed = ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    wanted, alive = (
        f"sum by (application) ({TARGET_REPLICAS})",
        f"sum by (application) ({s.series(c.UP)} == 1)",
    )
    return (
        Alert(
            name="QuireNoReplica",
            severity=Severity.CRITICAL,
            expression=f"{wanted} > 0 unless {alive}",
            hold=t.hold_critical,
            summary="{{ $labels.application }}: no replica is alive, {{ $value }} are wanted",
            action="No request is answered. `serve status` says why replicas do not start; `ray status` "
            "whether the cluster has the resources they ask for. A model that does not load says so in the "
            "replica's log.",
        ),
        Alert(
            name="QuireNonFiniteLogits",
            severity=Severity.CRITICAL,
            expression=f"{each.increase(c.NONFINITE)} > 0",
            hold="0s",
            summary="replica {{ $labels.replica }} gave up outputs because its logits were not finite",
            action="Weights or memory of this replica's GPUs are damaged. Kill the replica (Ray Serve "
            "starts another); if it happens again on the same node, remove the node and check its memory; "
            "if on all nodes, check the checkpoint.",
        ),
        Alert(
            name="QuireRequestsFailing",
            severity=Severity.CRITICAL,
            expression=f"{s.share(c.REQUESTS, _ASKED, status=failed)} > {t.bad_share:g}",
            hold=t.hold_critical,
            summary="{{ $labels.application }}: {{ $value | humanizePercentage }} of requests fail",
            action="See which status it is (dashboard, Requests). UNAVAILABLE: replicas die or none is "
            "ready; look at QuireReplicaMissing and the replicas' logs. DEADLINE_EXCEEDED: clients give "
            "up; look at Latency. INTERNAL: a bug or damage; the log of the gateway or replica has a "
            "traceback.",
        ),
        Alert(
            name="QuireReplicaMissing",
            severity=Severity.WARNING,
            expression=f"{wanted} > ({alive} or 0 * {wanted})",
            hold=t.hold,
            summary="{{ $labels.application }}: fewer replicas are alive than the {{ $value }} wanted",
            action="`serve status` names the ones that do not come up, `ray status` what they wait for. "
            "While an update or a scale-up loads weights this is normal; allow for it in the hold time.",
        ),
        Alert(
            name="QuireRequestsRetried",
            severity=Severity.WARNING,
            expression=f"{s.increase(c.RETRIES)} > 0",
            hold="0s",
            summary="{{ $labels.application }}: {{ $value }} requests moved to a second replica: one died",
            action="Clients did not notice these. Find the replica that ended (`serve status`, its log, "
            "`dmesg` for the out-of-memory killer). Once is an accident; repeatedly is a fault.",
        ),
        Alert(
            name="QuireNodeSilent",
            severity=Severity.WARNING,
            expression='up{job="ray"} == 0',
            hold=t.hold,
            summary="the metrics endpoint {{ $labels.instance }} does not answer",
            action="The node is gone, or its Ray agent is. `ray status`, `ray list nodes`. No other alert "
            "covers what runs there.",
        ),
    )


def _latency(t: Tuning, s: Scope) -> tuple[Alert, ...]:
    return (
        Alert(
            name="QuireFirstTokenSlow",
            severity=Severity.WARNING,
            expression=f"{s.quantile(0.9, c.FIRST_TOKEN)} > {t.first_token_s:g}",
            hold=t.hold,
            summary="{{ $labels.application }}: one request in ten waits over {{ $value | humanizeDuration "
            "}} for its first token",
            action="Dashboard, Latency: with a long Queue add replicas or raise the autoscaling bound; "
            "with a short one look at the hit rate (Cache) and at the size of prompts (capacity dashboard).",
        ),
        Alert(
            name="QuireTokensSlow",
            severity=Severity.WARNING,
            expression=f"{s.quantile(0.9, c.INTER_TOKEN)} > {t.inter_token_s:g}",
            hold=t.hold,
            summary="{{ $labels.application }}: one request in ten gets its tokens {{ $value | "
            "humanizeDuration }} apart",
            action="Too much runs in each step: lower scheduler.max_running or scheduler.max_step_tokens, "
            "or add replicas. Preemptions have the same effect.",
        ),
    )


def _capacity(t: Tuning, s: Scope) -> tuple[Alert, ...]:
    each = replace(s, by="application, replica")
    return (
        Alert(
            name="QuireGatewayFull",
            severity=Severity.WARNING,
            expression=f"{each.sum(c.GATEWAY_OPEN)} / {each.sum(c.GATEWAY_LIMIT)} > {t.full_share:g}",
            hold=t.hold_critical,
            summary="gateway {{ $labels.replica }} has {{ $value | humanizePercentage }} of the open "
            "requests it takes",
            action="Beyond the limit requests are refused. If replicas have room (Scheduler), raise "
            "gateway.max_open_requests or add gateways; if not, add replicas.",
        ),
        Alert(
            name="QuireRequestsRefused",
            severity=Severity.WARNING,
            expression=f"{s.share(c.REQUESTS, _ASKED, status='RESOURCE_EXHAUSTED')} > {t.bad_share:g}",
            hold=t.hold_critical,
            summary="{{ $labels.application }}: {{ $value | humanizePercentage }} of requests are refused",
            action="Gateways or queues are full: QuireGatewayFull and QuireQueueFull say which. Demand is "
            "beyond capacity: add replicas, or have clients retry later.",
        ),
        Alert(
            name="QuireQueueFull",
            severity=Severity.WARNING,
            expression=f"{each.sum(c.WAITING)} / {each.sum(c.WAITING_LIMIT)} > {t.full_share:g}",
            hold=t.hold_critical,
            summary="replica {{ $labels.replica }} has {{ $value | humanizePercentage }} of the sequences "
            "that may wait",
            action="Add replicas. If only this one is full, all requests share its prefix: dashboard, Cache.",
        ),
        Alert(
            name="QuirePoolFull",
            severity=Severity.WARNING,
            expression=f"{each.sum(c.PAGES, state='used')} / {each.sum(c.PAGES)} > {t.pool_share:g}",
            hold=t.hold,
            summary="running sequences hold {{ $value | humanizePercentage }} of the pages of {{ "
            "$labels.replica }}",
            action="Nothing is left for the cache, and preemption is next. A smaller KV format, more "
            "memory for the pool, a lower scheduler.max_running, or more replicas.",
        ),
        Alert(
            name="QuirePreempting",
            severity=Severity.WARNING,
            expression=f"{s.rate(c.PREEMPTIONS)} > {t.preemptions_s:g}",
            hold=t.hold,
            summary="{{ $labels.application }}: {{ $value | humanize }} sequences a second lose their "
            "pages and are recomputed",
            action="The pool is too small for what runs at once: as for QuirePoolFull.",
        ),
    )


def _store(t: Tuning, s: Scope) -> tuple[Alert, ...]:
    each = replace(s, by="application, replica")
    failures = s.increase(
        c.FETCH_FAILURES, cause=("no_pages", "peer", "deadline", "header", "checksum", "lease", "closed")
    )
    before = _hit_rate(t, replace(s, window=t.hit_history, ago=t.hit_gap))
    return (
        Alert(
            name="QuireTransfersFailing",
            severity=Severity.WARNING,
            expression=f"{failures} / ({s.increase(c.FETCHES)} > 0) > {t.fetch_failure_share:g}",
            hold=t.hold,
            summary="{{ $labels.application }}: {{ $value | humanizePercentage }} of fetches between "
            "replicas fail",
            action="No request fails, prompts are recomputed instead. Dashboard, Transfers, has the "
            "causes: deadline (links too slow, or store.fetch_timeout_s too short), peer (replicas die or "
            "the network is cut), no_pages (pools are full). `store.share: false` turns sharing off.",
        ),
        Alert(
            name="QuireBlocksDamaged",
            severity=Severity.WARNING,
            expression=f"{each.increase(c.FETCH_FAILURES, cause='checksum')} > 0",
            hold="0s",
            summary="replica {{ $labels.replica }} received blocks whose checksum did not match",
            action="They were dropped and recomputed. Bytes changed in transit, or in the memory of a peer "
            "after it had computed them: check the network cards and the memory of the replica and of its "
            "peers. (A process of a peer that was suspended for longer than its lease looks like this, "
            "too.)",
        ),
        Alert(
            name="QuireHitRateCollapsed",
            severity=Severity.WARNING,
            expression=f"{_hit_rate(t, s)} < {t.hit_drop:g} * ({before})",
            hold=t.hold,
            summary="{{ $labels.application }}: the hit rate fell to {{ $value | humanizePercentage }}",
            action="Prompts are computed that used to be cached. Did replicas restart or scale (their pools "
            "start empty), did the prompts' common beginning change (a date in the system prompt), is the "
            "pool too small (Blocks that left the pool)?",
        ),
    )


def _hit_rate(t: Tuning, s: Scope) -> str:
    """Return the hit rate, without a value where there are too few tokens."""
    asked = s.rate(c.PROMPT_TOKENS)
    return f"{s.rate(c.PROMPT_TOKENS, source=('local', 'host', 'remote'))} / ({asked} > {t.hit_tokens_s:g})"
