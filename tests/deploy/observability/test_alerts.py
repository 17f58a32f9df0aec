"""Each alert, over made-up series, by Prometheus' own rule tester.

It fires after its hold time, not before, and not while all is well. `test_observed.py` provokes them in a
running service.
"""

import shutil
import subprocess

import pytest
import yaml
from observability.alerts import alerts
from observability.generate import ROOT, rules_yaml

RULES = ROOT / "deploy/prometheus/quire.rules.yml"
NAMES = [alert.name for alert in alerts()]
APP = 'application="quire"'
WANTED = f'ray_serve_autoscaling_target_replicas{{deployment="Replica", {APP}}}'
ONE, TWO = f'{APP}, replica="one"', f'{APP}, replica="two"'

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)


def _buckets(name, slow):
    """A histogram of one observation a second, all between `slow` and the bound before it."""
    return {
        f'{name}_bucket{{{APP}, le="0.001"}}': "0+0x60",
        f'{name}_bucket{{{APP}, le="{slow}"}}': "0+60x60",
        f'{name}_bucket{{{APP}, le="+Inf"}}': "0+60x60",
    }


def _asked(status, bad):
    return {
        f'ray_quire_requests_total{{{APP}, method="Chat", status="OK"}}': "0+100x60",
        f'ray_quire_requests_total{{{APP}, method="Chat", status="{status}"}}': f"0+{bad}x60",
        f'ray_quire_requests_total{{{APP}, method="GetStats", status="{status}"}}': "0+1000x60",
    }


def _of(part, whole, used, free):
    """Two gauges, or one by state."""
    return {part: f"{used}x60", whole: f"{free}x60"}


CASES = {  # series by name: such that it fires, such that it does not; a step is a minute
    "QuireNoReplica": (
        {WANTED: "2x60", f"ray_quire_replica_up{{{ONE}}}": "0x60"},
        {WANTED: "0x60"},
    ),
    "QuireNonFiniteLogits": (
        {f"ray_quire_nonfinite_outputs_total{{{ONE}}}": "0x57 1x2"},
        {f"ray_quire_nonfinite_outputs_total{{{ONE}}}": "7x60"},
    ),
    "QuireRequestsFailing": (_asked("UNAVAILABLE", 2), _asked("UNAVAILABLE", 1)),
    "QuireReplicaMissing": (
        {WANTED: "2x60", f"ray_quire_replica_up{{{ONE}}}": "1x60"},
        {
            WANTED: "2x60",
            f"ray_quire_replica_up{{{ONE}}}": "1x60",
            f"ray_quire_replica_up{{{TWO}}}": "1x60",
        },
    ),
    "QuireRequestsRetried": (
        {f"ray_quire_gateway_retries_total{{{ONE}}}": "0x57 1x2"},
        {f"ray_quire_gateway_retries_total{{{ONE}}}": "3x60"},
    ),
    "QuireNodeSilent": (
        {'up{job="ray", instance="a:1"}': "0x60"},
        {'up{job="ray", instance="a:1"}': "1x60", 'up{job="other", instance="b:1"}': "0x60"},
    ),
    "QuireFirstTokenSlow": (
        _buckets("ray_quire_request_first_token_seconds", "4.0"),
        _buckets("ray_quire_request_first_token_seconds", "2.0"),
    ),
    "QuireTokensSlow": (
        _buckets("ray_quire_request_inter_token_seconds", "0.25"),
        _buckets("ray_quire_request_inter_token_seconds", "0.1"),
    ),
    "QuireGatewayFull": (
        _of(
            f"ray_quire_gateway_open_requests{{{ONE}}}",
            f"ray_quire_gateway_open_requests_limit{{{ONE}}}",
            91,
            100,
        ),
        _of(
            f"ray_quire_gateway_open_requests{{{ONE}}}",
            f"ray_quire_gateway_open_requests_limit{{{ONE}}}",
            90,
            100,
        ),
    ),
    "QuireRequestsRefused": (_asked("RESOURCE_EXHAUSTED", 2), _asked("RESOURCE_EXHAUSTED", 1)),
    "QuireQueueFull": (
        _of(f"ray_quire_waiting_sequences{{{ONE}}}", f"ray_quire_waiting_sequences_limit{{{ONE}}}", 91, 100),
        _of(f"ray_quire_waiting_sequences{{{ONE}}}", f"ray_quire_waiting_sequences_limit{{{ONE}}}", 90, 100),
    ),
    "QuirePoolFull": (
        _of(f'ray_quire_pages{{{ONE}, state="used"}}', f'ray_quire_pages{{{ONE}, state="cached"}}', 96, 4),
        _of(f'ray_quire_pages{{{ONE}, state="used"}}', f'ray_quire_pages{{{ONE}, state="cached"}}', 10, 90),
    ),
    "QuirePreempting": (
        {f"ray_quire_preemptions_total{{{ONE}}}": "0+8x60"},
        {f"ray_quire_preemptions_total{{{ONE}}}": "0+4x60"},
    ),
    "QuireTransfersFailing": (
        {
            f"ray_quire_fetches_total{{{ONE}}}": "0+10x60",
            f'ray_quire_fetch_failures_total{{{ONE}, cause="deadline"}}': "0+2x60",
        },
        {
            f"ray_quire_fetches_total{{{ONE}}}": "0+10x60",
            f'ray_quire_fetch_failures_total{{{ONE}, cause="busy"}}': "0+5x60",
        },
    ),
    "QuireBlocksDamaged": (
        {f'ray_quire_fetch_failures_total{{{ONE}, cause="checksum"}}': "0x57 1x2"},
        {f'ray_quire_fetch_failures_total{{{ONE}, cause="deadline"}}': "0x57 1x2"},
    ),
    "QuireHitRateCollapsed": (
        {
            f'ray_quire_prompt_tokens_total{{{ONE}, source="local"}}': "0+900x40 36000+100x20",
            f'ray_quire_prompt_tokens_total{{{ONE}, source="computed"}}': "0+300x40 12000+1100x20",
        },
        {
            f'ray_quire_prompt_tokens_total{{{ONE}, source="local"}}': "0+900x40 36000+500x20",
            f'ray_quire_prompt_tokens_total{{{ONE}, source="computed"}}': "0+300x40 12000+700x20",
        },
    ),
}


ALSO = {"QuireNoReplica": ["QuireReplicaMissing"]}
"""What fires with it, rightly."""


def _case(series, minute, firing):
    """Over these series, which alerts fire so many minutes later."""
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing],
            }
        ],
    }


def _check(folder, cases):
    path = folder / "test.yml"
    tree = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": cases}
    path.write_text(yaml.safe_dump(tree))
    done = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_a_case_for_every_alert():
    assert list(CASES) == NAMES


def test_each_fires_when_it_should_and_no_other(tmp_path):
    _check(tmp_path, [_case(bad, 59, [name, *ALSO.get(name, [])]) for name, (bad, _) in CASES.items()])


def test_each_is_quiet_when_all_is_well(tmp_path):
    _check(tmp_path, [_case(good, 59, []) for _, good in CASES.values()])


def test_a_condition_must_last(tmp_path):
    """QuireReplicaMissing holds five minutes: a replica may take so long to load."""
    series = {WANTED: "2x60", f"ray_quire_replica_up{{{ONE}}}": "1x60"}
    _check(tmp_path, [_case(series, 4, []), _case(series, 6, ["QuireReplicaMissing"])])


def test_an_application_does_not_hide_another_one(tmp_path):
    ours = {WANTED: "1x60", f"ray_quire_replica_up{{{ONE}}}": "1x60"}
    theirs = {WANTED.replace(APP, 'application="other"'): "1x60"}
    _check(tmp_path, [_case({**ours, **theirs}, 3, ["QuireNoReplica"])])


def test_promtool_finds_no_fault_in_the_rules():
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(NAMES)} rules found" in done.stdout
    assert rules_yaml(alerts()) in RULES.read_text()
