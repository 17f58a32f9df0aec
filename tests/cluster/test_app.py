"""What a new configuration replaces: a deployment's version changes when its processes must, only then."""

import subprocess
import sys

import pytest

from quire.cluster.app import application
from quire.cluster.config import parse
from quire.replicas.errors import ConfigError

TREE = {"engine": {"model": "demo"}, "replicas": {"count": 2}, "prefill": {"count": 1}, "secret": "kept"}


def deployments(**changes) -> dict[str, object]:
    """By name. `changes`: by branch."""
    tree = TREE | {
        branch: {**TREE.get(branch, {}), **new} if isinstance(new, dict) else new
        for branch, new in changes.items()
    }
    gateway = application(parse(tree))._bound_deployment
    inner = [a._bound_deployment for a in gateway.init_args if hasattr(a, "_bound_deployment")]
    return {deployment.name: deployment for deployment in (gateway, *inner)}


def versions(**changes) -> dict[str, str]:
    return {name: deployment.version for name, deployment in deployments(**changes).items()}


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({}, set()),
        ({"replicas": {"count": 5}}, set()),
        ({"prefill": {"count": 3}}, set()),
        ({"replicas": {"health_check_period_s": 2.0}}, set()),
        ({"gateway": {"count": 2}}, set()),
        ({"gateway": {"max_open_requests": 7}}, {"Gateway"}),
        ({"engine": {"kv": "int4"}}, {"Replica", "Prefill"}),
        ({"engine": {"model": "elsewhere"}}, {"Replica", "Prefill"}),
        ({"engine": {"revision": "2"}}, {"Replica", "Prefill"}),
        ({"secret": "another"}, {"Gateway", "Replica", "Prefill"}),
    ],
)
def test_only_what_changes_is_replaced(changes, replaced):
    before, after = versions(), versions(**changes)
    assert {name for name in before if before[name] != after[name]} == replaced


def test_a_version_does_not_show_the_secret():
    assert "kept" not in "".join(versions().values())


def test_serve_is_told_how_to_update():
    found = deployments(replicas={"update_percent": 50.0, "surge_percent": 30})
    options = found["Replica"]._deployment_config
    assert (options.rolling_update_percentage, options.max_surge_percent) == (0.5, 30)


@pytest.mark.parametrize(
    ("gateway", "per_node", "surge"),
    [
        ({"port": 8100}, None, 100),
        ({"port": 8100, "count": 2}, 1, 0),
        ({"port": 0, "count": 2}, None, 100),
    ],
)
def test_gateways_that_share_no_port_are_spread_over_nodes(gateway, per_node, surge):
    deployment = deployments(gateway=gateway)["Gateway"]
    assert deployment.num_replicas == gateway.get("count", 1)
    assert deployment._replica_config.max_replicas_per_node == per_node
    assert deployment._deployment_config.max_surge_percent == surge


@pytest.mark.parametrize(
    ("branch", "text"),
    [
        ({"gateway": {"count": 0}}, r"gateway\.count must be .*\(at least 1\), got 0"),
        (
            {"replicas": {"update_percent": 0}},
            r"update_percent .*at least 1 and at most 100\), got 0",
        ),
        (
            {"replicas": {"surge_percent": 101}},
            r"surge_percent .*at least 0 and at most 100\), got 101",
        ),
    ],
)
def test_bounds_of_updates_are_named(branch, text):
    with pytest.raises(ConfigError, match=text):
        parse({"engine": {"model": "demo"}, **branch})


def test_who_deploys_loads_no_models_code():
    """It takes seconds, which `quire serve` and every gateway would pay."""
    heavy = {"transformers.modeling_utils", "triton"}
    code = f"import sys, quire.cluster.app; sys.exit(str({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
